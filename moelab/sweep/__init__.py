"""Sweeps: many runs from named generators in an experiment file, in local processes or on a Slurm cluster.

    def sweep_routers():
        yield {"router.kind": "top_k"}
        yield {"name": "finer", "moe.num_experts": 32, "moe.expert_width": 64, "router.k": 4}

    def sweep_seeds():
        for seed in range(5):
            yield {"seed": seed}

    moelab sweep --config=FILE --sweep=routers,seeds --jobs=2

points.py makes and checks the points, cost.py says what they cost, directory.py keeps the sweep directory (one run
directory per point, `logs/`, and `sweep.json`), running.py runs what is left in it, by local.py or cluster.py. A run's
seed decides its initialisation and the order of its data, so arms that share seeds are paired.
"""

from moelab.sweep.directory import Directory
from moelab.sweep.points import Point, plan
from moelab.sweep.running import run, submit

__all__ = ["Directory", "Point", "plan", "run", "submit"]
