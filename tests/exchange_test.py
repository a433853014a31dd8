"""Experts split over devices compute what experts on one device do."""

import os
import subprocess
import sys


def test_experts_split_over_devices():
    """A process of its own has 8 virtual devices."""
    code = os.path.join(os.path.dirname(__file__), "exchange_check.py")
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, code],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "experts split over devices: equal" in done.stdout
