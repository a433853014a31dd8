"""Expectations of compiled kernels: each lets a good kernel pass and finds what is wrong with a bad one."""

import dataclasses

import pytest
from compiled_kernels import GOOD, HOPPER, MMA, OUTSIDE, compiled, sass

from pallas_kernels.verify import case as cases
from pallas_kernels.verify import expect, runner

BAD = {
    "a missing MMA": (
        expect.block_scaled_mma("nvfp4", 2),
        {"ptx": f"{MMA};", "sass": sass("UTCOMMA.4X")},
        "1 UTCOMMA instead of 2",
    ),
    "MXFP4's MMA for NVFP4": (
        expect.block_scaled_mma("nvfp4", 2),
        {"ptx": f"{MMA[:-2]}2X;" * 2, "sass": sass("UTCOMMA", "UTCOMMA")},
        "0 UTCOMMA by blocks of 16 instead of 2",
    ),
    "NVFP4's MMA for MXFP4": (expect.block_scaled_mma("mxfp4", 2), {}, "scale_vec::2X in PTX"),
    "one CTA for two": (
        expect.block_scaled_mma("nvfp4", 2, ctas=2),
        {},
        "0 tcgen05.mma.cta_group::2",
    ),
    "a bfloat16 MMA beside": (
        expect.block_scaled_mma("nvfp4", 2),
        {"sass": GOOD.sass + OUTSIDE.format("HMMA.16816.F32.BF16")},
        "3 MMAs of any kind instead of 2",
    ),
    "a wgmma in PTX": (
        expect.block_scaled_mma("nvfp4", 2),
        {"ptx": GOOD.ptx + HOPPER.ptx},
        "3 MMAs of any kind in PTX instead of 2",
    ),
    "an MMA before the loop": (
        expect.block_scaled_mma("nvfp4", 2),
        {"sass": sass("UTCOMMA.4X") + OUTSIDE.format("UTCOMMA.4X")},
        "1 UTCOMMA in its innermost loop instead of 2",
    ),
    "too few scales": (expect.scale_copies(2), {}, "1 UTCCP instead of 2"),
    "too many loads": (expect.tma_loads(1), {}, "2 UTMALDG instead of 1"),
    "a load outside": (
        expect.tma_loads(3),
        {"sass": GOOD.sass + OUTSIDE.format("UTMALDG.2D")},
        "2 UTMALDG in its innermost loop instead of 3",
    ),
    "MMAs where none should be": (expect.no_mma(), {}, "2 MMAs of any kind instead of 0"),
    "another MMA": (
        expect.mma(r"wgmma.*", "HGMMA.*"),
        {},
        "MMAs in machine code that are not HGMMA.*: UTCOMMA.4X",
    ),
    "no MMA": (expect.mma(".*", ".*"), {"ptx": "", "sass": sass("FFMA")}, "no .* in PTX"),
    "another number of MMAs": (expect.mma(".*", ".*", count=3), {}, "2 .* in PTX instead of 3"),
    "an instruction too many": (
        expect.instructions("UTMALDG", at_most=1),
        {},
        "2 UTMALDG, not 1 to 1",
    ),
    "an instruction that is missing": (expect.instructions("LDGSTS"), {}, "0 LDGSTS, not 1 to"),
    "spilled registers": (expect.no_spills, {"spill_bytes": 8}, "8 bytes spilled"),
    "a stack": (expect.no_spills, {"stack_bytes": 16}, "16 bytes of stack"),
    "local memory": (
        expect.no_spills,
        {"sass": GOOD.sass + OUTSIDE.format("@P0 LDL.64 R2, [R1+0x8]")},
        "1 loads and stores of local memory",
    ),
    "registers of a thread": (
        expect.within_limits,
        {"registers": 256, "threads": 32},
        "256 registers of a thread, of 255",
    ),
    # 200 registers * 384 threads
    "registers of a block": (
        expect.within_limits,
        {"registers": 200, "threads": 384},
        "76800 registers of a block, of 65536",
    ),
    "shared memory": (expect.within_limits, {"shared_bytes": 2049}, "2049 bytes of shared memory"),
    "tensor memory": (expect.within_limits, {"tmem_columns": 1024}, "1024 columns"),
    "more shared memory than planned": (
        expect.memories(shared_at_most=1999, tmem_columns=300),
        {},
        "2000 bytes of shared memory, not 1999",
    ),
    # 200 columns: 256 are allocated
    "other tensor memory than planned": (
        expect.memories(shared_at_most=2000, tmem_columns=200),
        {},
        "512 columns of tensor memory instead of 256",
    ),
    "another kernel": (
        expect.no_mma("halve"),
        {},
        "one kernel 'halve' was expected among: grouped",
    ),
    "two kernels": (expect.num_kernels(2), {}, "1 kernels instead of 2: grouped"),
}


class TestExpectations:
    @pytest.mark.parametrize(
        "expectation",
        [
            expect.block_scaled_mma("nvfp4", 2),
            expect.block_scaled_mma("nvfp4", 2, kernel="grou"),
            expect.scale_copies(1),
            expect.tma_loads(2),
            expect.mma(r"tcgen05\.mma.*4X", r"UTCOMMA\.4X", count=2),
            expect.instructions("UTMALDG", at_least=2, at_most=2),
            expect.no_spills,
            expect.within_limits,
            expect.memories(shared_at_most=2000, tmem_columns=300),
            expect.num_kernels(1),
            expect.temp_at_most(0),
        ],
    )
    def test_a_good_kernel_passes(self, expectation):
        assert expectation(compiled(GOOD)) == []

    @pytest.mark.parametrize(("expectation", "changes", "problem"), BAD.values(), ids=BAD)
    def test_a_bad_one_does_not(self, expectation, changes, problem):
        found = expectation(compiled(dataclasses.replace(GOOD, **changes)))
        assert any(problem in text for text in found), found

    @pytest.mark.parametrize("name", ["UTCOMMA.4X", "UTCOMMA.2CTA.4X", "UTCOMMA.BLOCK16"])
    def test_blocks_of_16_have_a_name_on_each_architecture(self, name):
        code = dataclasses.replace(GOOD, sass=GOOD.sass.replace("UTCOMMA.4X", name))
        assert expect.block_scaled_mma("nvfp4", 2)(compiled(code)) == []

    @pytest.mark.parametrize(
        ("expectation", "problem"),
        [
            (expect.block_scaled_mma("mxfp4", 2), "0 tcgen05.mma.cta_group::1.kind::mxf4nvf4"),
            (expect.scale_copies(2), "1 tcgen05.cp in PTX instead of 2"),
            (expect.tma_loads(1), "2 TMA loads in PTX instead of 1"),
            (expect.no_mma(), "2 MMAs of any kind in PTX instead of 0"),
            (expect.mma("wgmma.*", ".*"), "MMAs in PTX that are not wgmma.*"),
        ],
    )
    def test_without_a_disassembler_ptx_is_looked_at(self, expectation, problem):
        found = expectation(compiled(dataclasses.replace(GOOD, sass="")))
        assert len(found) in (1, 2) and problem in found[0]

    @pytest.mark.parametrize(
        "expectation",
        [
            expect.block_scaled_mma("nvfp4", 2),
            expect.scale_copies(1),
            expect.tma_loads(2),
            expect.mma(r"tcgen05\.mma.*4X", "UTCOMMA"),
            expect.instructions("LDGSTS"),
            expect.no_spills,
        ],
    )
    def test_and_a_good_kernel_passes_without_one(self, expectation):
        assert expectation(compiled(dataclasses.replace(GOOD, sass=""))) == []

    def test_wgmma(self):
        assert expect.mma(r"wgmma.*m64n128k16.*", "HGMMA.64x128x16.*")(compiled(HOPPER)) == []
        assert expect.no_mma()(compiled(HOPPER)) != []

    def test_temporary_memory(self):
        assert expect.temp_at_most(99)(compiled(GOOD, temp=100)) == [
            "100 bytes of temporary memory, not 99"
        ]

    def test_a_program_without_kernels_has_failed(self):
        nothing = cases.Case(
            name="", format="", runs_on=lambda _: True, build=lambda _: None, expectations=()
        )
        assert runner.problems(nothing, compiled()) == (
            "no Mosaic or Triton kernel in the program",
        )
        assert runner.problems(nothing, compiled(GOOD)) == ()
