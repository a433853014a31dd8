"""The options of `moelab sweep`."""

from __future__ import annotations

from moelab.cli import words


def declare(commands) -> None:
    """Adds the command."""
    sweep = words.add(
        commands,
        "sweep",
        "sweep:sweep",
        "run many points of a config: what is finished is skipped, what stopped goes on",
        words.takes_config,
    )
    for name, kind, default, metavar, text in (
        ("sweep", words.names, (), "A,B", "generators of the config file; several multiply"),
        ("seeds", words.seeds, (), "0-4", "also every seed of a list: 0,1,2 or 0-4"),
        ("workdir", str, "", "DIR", "sweep directory (runs/FILE-SWEEPS)"),
        (
            "jobs",
            words.positive,
            None,
            "N",
            "runs at a time: here 1, each on its share of the cores",
        ),
    ):
        sweep.add_argument(f"--{name}", type=kind, default=default, metavar=metavar, help=text)
    for name, text in (
        ("list", "show the points, their status and cost; run nothing"),
        ("retry", "run failed points again"),
        ("drop_checkpoints", "delete checkpoints of finished runs: reports need none, verify does"),
        ("slurm", "submit the points as a Slurm job array instead (extra `cluster`)"),
    ):
        sweep.add_argument(f"--{name}", action="store_true", help=text)
    sweep.add_argument(
        "--slurm_option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for submitit: timeout_min=60, slurm_partition=gpu, ...; repeat for more",
    )
