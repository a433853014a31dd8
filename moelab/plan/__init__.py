"""What a model costs to serve and to train on hardware that is not here: numbers on paper, with numpy alone.

    figures, gpus, hardware     GPUs and systems; every figure with its source, its date and what contradicts it
    models, published, readers  shapes of models: parameters, bytes, FLOPs; from config.json and moelab configs
    recipes                     which weight is stored and computed in which precision
    coverage, work, roofline    experts that a batch touches; what a GPU computes, reads, sends; how long that takes
    serving, search             time per token, throughput, memory; every layout and batch, the Pareto front
    training                    a training step over tensor, pipeline, expert and data parallelism; MFU, memory
    prices                      dollars per GPU-hour by basis, dollars and joules per token, break-even ratios
    measured, calibrate, calibration, validation, peer
                                measured rows of an optional wheel; the fit; what it gave; how good it is beside others
    named, own_rows             published rates in no fit; rows of your own, predicted
    physics, audit              least possible times; rows of a table that are faster
    attribution, evidence, claim, claims, joint
                                what a gain is due to (Shapley); what others measured; claims, tests, verdicts;
                                quality beside cost
    facts, plots, pages         the constants as tables; figures and HTML

README.md beside this file says what is modelled, what is not, and how good it is.
"""
