"""The fused FP4 feed-forward of data-centre Blackwell: its interpreted tests, in a process with enough workers.

XLA's CPU client has as many workers as the machine has cores. Interpreted warps that wait for each other hold one each,
and on two cores none may be left for the warp that they wait for.
"""

import os
import subprocess
import sys


def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "tests/mosaic_sm100_mlp_interpreted.py"],
        env=os.environ | {"PJRT_NPROC": "8"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
