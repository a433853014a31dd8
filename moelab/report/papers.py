"""Titles and first authors of the papers that moelab's docstrings name, by arXiv id.

Each id, title and author was compared with citations in public repositories (BibTeX, reference lists), titles as on
arXiv, where a later publication may have another. Compare before you add one: memory errs in both.
"""

from __future__ import annotations

# arXiv id -> (first authors, title)
PAPERS = {
    "1308.3432": (
        "Bengio, Yoshua and Léonard, Nicholas and Courville, Aaron",
        "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation",
    ),
    "1503.02531": (
        "Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff",
        "Distilling the Knowledge in a Neural Network",
    ),
    "1701.06538": (
        "Shazeer, Noam and Mirhoseini, Azalia and Maziarz, Krzysztof and others",
        "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
    ),
    "1910.10683": (
        "Raffel, Colin and Shazeer, Noam and Roberts, Adam and others",
        "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    ),
    "1911.00359": (
        "Wenzek, Guillaume and Lachaux, Marie-Anne and Conneau, Alexis and others",
        "CCNet: Extracting High Quality Monolingual Datasets from Web Crawl Data",
    ),
    "1912.00582": (
        "Warstadt, Alex and Parrish, Alicia and Liu, Haokun and others",
        "BLiMP: The Benchmark of Linguistic Minimal Pairs for English",
    ),
    "2006.16668": (
        "Lepikhin, Dmitry and Lee, HyoukJoong and Xu, Yuanzhong and others",
        "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding",
    ),
    "2101.03961": (
        "Fedus, William and Zoph, Barret and Shazeer, Noam",
        "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
    ),
    "2103.16716": (
        "Lewis, Mike and Bhosale, Shruti and Dettmers, Tim and others",
        "BASE Layers: Simplifying Training of Large, Sparse Models",
    ),
    "2106.04426": (
        "Roller, Stephen and Sukhbaatar, Sainbayar and Szlam, Arthur and Weston, Jason",
        "Hash Layers For Large Sparse Models",
    ),
    "2106.05974": (
        "Riquelme, Carlos and Puigcerver, Joan and Mustafa, Basil and others",
        "Scaling Vision with Sparse Mixture of Experts",
    ),
    "2107.06499": (
        "Lee, Katherine and Ippolito, Daphne and Nystrom, Andrew and others",
        "Deduplicating Training Data Makes Language Models Better",
    ),
    "2112.11446": (
        "Rae, Jack W. and Borgeaud, Sebastian and Cai, Trevor and others",
        "Scaling Language Models: Methods, Analysis & Insights from Training Gopher",
    ),
    "2202.01169": (
        "Clark, Aidan and de las Casas, Diego and Guy, Aurelia and others",
        "Unified Scaling Laws for Routed Language Models",
    ),
    "2202.08906": (
        "Zoph, Barret and Bello, Irwan and Kumar, Sameer and others",
        "ST-MoE: Designing Stable and Transferable Sparse Expert Models",
    ),
    "2202.09368": (
        "Zhou, Yanqi and Lei, Tao and Liu, Hanxiao and others",
        "Mixture-of-Experts with Expert Choice Routing",
    ),
    "2204.09179": (
        "Chi, Zewen and Dong, Li and Huang, Shaohan and others",
        "On the Representation Collapse of Sparse Mixture of Experts",
    ),
    "2205.10487": (
        "Hernandez, Danny and Brown, Tom and Conerly, Tom and others",
        "Scaling Laws and Interpretability of Learning from Repeated Data",
    ),
    "2209.11895": (
        "Olsson, Catherine and Elhage, Nelson and Nanda, Neel and others",
        "In-context Learning and Induction Heads",
    ),
    "2210.17323": (
        "Frantar, Elias and Ashkboos, Saleh and Hoefler, Torsten and Alistarh, Dan",
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    ),
    "2211.10438": (
        "Xiao, Guangxuan and Lin, Ji and Seznec, Mickael and others",
        "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
    ),
    "2212.05055": (
        "Komatsuzaki, Aran and Puigcerver, Joan and Lee-Thorp, James and others",
        "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
    ),
    "2212.08066": (
        "Chen, Zitian and Shen, Yikang and Ding, Mingyu and others",
        "Mod-Squad: Designing Mixture of Experts As Modular Multi-Task Learners",
    ),
    "2302.03169": (
        "Xie, Sang Michael and Santurkar, Shibani and Ma, Tengyu and Liang, Percy",
        "Data Selection for Language Models via Importance Resampling",
    ),
    "2306.00978": (
        "Lin, Ji and Tang, Jiaming and Tang, Haotian and others",
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    ),
    "2308.00951": (
        "Puigcerver, Joan and Riquelme, Carlos and Mustafa, Basil and Houlsby, Neil",
        "From Sparse to Soft Mixtures of Experts",
    ),
    "2312.04927": (
        "Arora, Simran and Eyuboglu, Sabri and Timalsina, Aman and others",
        "Zoology: Measuring and Improving Recall in Efficient Language Models",
    ),
    "2401.04088": (
        "Jiang, Albert Q. and Sablayrolles, Alexandre and Roux, Antoine and others",
        "Mixtral of Experts",
    ),
    "2401.06066": (
        "Dai, Damai and Deng, Chengqi and Zhao, Chenggang and others",
        "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
    ),
    "2403.07652": (
        "Huang, Quzhe and An, Zhenwei and Zhuang, Nan and others",
        "Harder Tasks Need More Experts: Dynamic Routing in MoE Models",
    ),
    "2405.04434": (
        "{DeepSeek-AI}",
        "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
    ),
    "2405.20541": (
        "Ankner, Zachary and Blakeney, Cody and Sreenivasan, Kartik and others",
        "Perplexed by Perplexity: Perplexity-Based Data Pruning With Small Reference Models",
    ),
    "2406.11794": (
        "Li, Jeffrey and Fang, Alex and Smyrnis, Georgios and others",
        "DataComp-LM: In search of the next generation of training sets for language models",
    ),
    "2406.17557": (
        "Penedo, Guilherme and Kydlíček, Hynek and Ben Allal, Loubna and others",
        "The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale",
    ),
    "2408.15664": (
        "Wang, Lean and Gao, Huazuo and Zhao, Chenggang and others",
        "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
    ),
    "2409.02060": (
        "Muennighoff, Niklas and Soldaini, Luca and Groeneveld, Dirk and others",
        "OLMoE: Open Mixture-of-Experts Language Models",
    ),
    "2410.07348": (
        "Jin, Peng and Zhu, Bo and Yuan, Li and Yan, Shuicheng",
        "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts",
    ),
    "2410.07524": (
        "He, Ethan and Khattar, Abhinav and Prenger, Ryan and others",
        "Upcycling Large Language Models into Mixture of Experts",
    ),
    "2412.14711": (
        "Wang, Ziteng and Zhu, Jun and Chen, Jianfei",
        "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing",
    ),
    "2412.19437": (
        "{DeepSeek-AI}",
        "DeepSeek-V3 Technical Report",
    ),
    "2501.11873": (
        "Qiu, Zihan and Huang, Zeyu and Zheng, Bo and others",
        "Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized Mixture-of-Expert Models",
    ),
    "2505.03804": (
        "Hu, Xing and Chen, Zhixuan and Yang, Dawei and others",
        "MoEQuant: Enhancing Quantization for Mixture-of-Experts Large Language Models via "
        "Expert-Balanced Sampling and Affinity Guidance",
    ),
    "2506.13329": (
        "Fu, Zhongqian and others",
        "EAQuant: Enhancing Post-Training Quantization for MoE Models via Expert-Aware Optimization",
    ),
    "2509.23202": (
        "Egiazarian, Vage and Castro, Roberto L. and Kuznedelev, Denis and others",
        "Bridging the Gap Between Promise and Performance for Microscaling FP4 Quantization",
    ),
    "2509.25149": (
        "{NVIDIA} and Abecassis, Felix and Agrusa, Anjulie and others",
        "Pretraining Large Language Models with NVFP4",
    ),
    "2510.27527": (
        "Chen, Yuxiang and Xu, Xiaoming and Zhang, Pengle and others",
        "TetraJet-v2: Accurate NVFP4 Training for Large Language Models with Oscillation Suppression "
        "and Outlier Control",
    ),
    "2512.02010": (
        "Cook, Jack and Guo, Junxian and Xiao, Guangxuan and others",
        "Four Over Six: More Accurate NVFP4 Quantization with Adaptive Block Scaling",
    ),
    "2601.20088": (
        "Xin, Meng and Priyadarshi, Sweta and Xin, Jingyu and others",
        "Quantization-Aware Distillation for NVFP4 Inference Accuracy Recovery",
    ),
    "2605.19407": (
        "Mohri, Christopher and Duchi, John and Hashimoto, Tatsunori",
        "A Bitter Lesson for Data Filtering",
    ),
}
