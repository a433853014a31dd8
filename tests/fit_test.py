"""Whole models compiled for GPUs that are not here: kernels and collectives in the program, bytes of a device."""

import dataclasses

import pytest

from moelab import fit
from pallas_kernels import aot

SMALL = ["model.num_layers=2", "model.width=512", "model.num_heads=4", "model.num_kv_heads=4"]


def compiled(preset, target, devices, *overrides):
    name = f"serving/packed:{preset}" if preset else "serving/packed"
    arguments = dict(config=name, overrides=[*SMALL, *overrides])
    return fit.in_process(target, arguments | dict(devices=devices, tokens=256, format="nvfp4"))


GOOD = fit.Fit(
    target="b200",
    devices=1,
    kernels={"grouped_matmul_nvfp4": 2},
    collectives=(),
    expert_parameters=1600,
    expert_bytes=900,
    bits=4.5,
    rest_bytes=100,
    argument_bytes=1000,
    temp_bytes=10,
    memory_bytes=10**7,
    seconds=1.0,
)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(argument_bytes=2 * 10**6), "weights are 1000"),
        (dict(bits=4.6), "4.600 bits"),
        (dict(memory_bytes=800), "210 bytes more than the GPU's 800"),
        (dict(kernels={}), "no grouped matmul kernel"),
    ],
)
def test_problems_are_said(change, words):
    assert GOOD.problems() == []
    (problem,) = dataclasses.replace(GOOD, **change).problems()
    assert words in problem


def test_topologies():
    assert fit.topology_of(8) == "1x1x8"
    assert fit.topology_of(72) == "1x18x4"
    with pytest.raises(ValueError, match="come in fours, got 9"):
        fit.topology_of(9)


@pytest.mark.slow
@pytest.mark.skipif(bool(aot.missing()), reason=aot.missing())
class TestCompiled:
    def test_one_b200(self):
        found = compiled("", "b200", 1, "moe.num_experts=16")
        assert found.problems() == []
        # One scanned layer: rows and activations to codes, gate and up with SwiGLU, down.
        fused = dict(quantize_nvfp4=2, gate_up_swiglu_nvfp4=1, grouped_matmul_nvfp4=1)
        assert found.kernels == fused and found.collectives == ()
        assert found.expert_parameters == 2 * 16 * 3 * 512 * 1024

    def test_experts_split_over_eight_b200(self):
        found = compiled("qwen3_235b", "b200", 8, "moe.expert_width=512", "moe.num_experts=32")
        assert found.problems() == []
        assert "ragged-all-to-all" in found.collectives
        assert found.expert_bytes * 8 == pytest.approx(2 * 32 * 3 * 512 * 512 * 4.5 / 8, rel=1e-3)

    def test_a_trillion_expert_parameters_on_72_gb200(self):
        arguments = dict(config="serving/packed:trillion", overrides=[])
        arguments |= dict(devices=72, tokens=512, format="nvfp4")
        found = fit.in_process("gb200", arguments)
        assert found.problems() == []
        assert found.expert_parameters == 64 * 360 * 3 * 7168 * 2048 > 10**12
        assert found.expert_bytes < 7.5 * 2**30 and found.temp_bytes < 2**30
        assert "ragged-all-to-all" in found.collectives
