"""What a model costs to serve and to train on hardware that is not here: numbers on paper, with numpy alone.

    figures, gpus, hardware     GPUs and systems; every figure with its source, its date and what contradicts it
    models, published, readers  shapes of models: parameters, bytes, FLOPs; from config.json and moelab configs
    recipes                     which weight is stored and computed in which precision
    coverage, work, roofline    experts that a batch touches; what a GPU computes, reads, sends; how long that takes
    serving, search             time per token, throughput, memory; every layout and batch, the Pareto front
    measured, calibrate, calibration, validation, peer
                                measured rows of an optional wheel; the fit; what it gave; how good it is, and beside whom
"""
