"""What a model costs to serve and to train on hardware that is not here: numbers on paper, with numpy alone.

gpus, hardware      GPUs and systems, every figure with its source, its date and the values that contradict it
published, models   shapes of models: parameters, bytes, FLOPs;  readers  from config.json and moelab configs
recipes             which weight is stored and computed in which precision
"""
