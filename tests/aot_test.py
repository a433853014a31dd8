"""Compiling for GPUs that are not here: descriptions, machine code, HLO, and expectations that can fail."""

import dataclasses
import textwrap

import pytest

from pallas_kernels import aot, hlo_text, machine_code, targets
from pallas_kernels.machine_code import Kernel
from pallas_kernels.verify import case as cases
from pallas_kernels.verify import expect, runner

needs_aot = pytest.mark.skipif(bool(aot.missing()), reason=aot.missing() or "installed")
PROTO = """
# A GPU that was never built.
gpu_device_info {
  core_count: 7
  memory_bandwidth: 2000000000000
  l2_cache_size: 1024
  clock_rate_ghz: 1.5
  device_memory_size: 4096
  shared_memory_per_block_optin: 2048
  cuda_compute_capability { major: 10 minor: 3 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  matrix_unit_description {
    rate_infos { key: 16 value { clock_rate_ghz: 2 units_per_core: 4 ops_per_clock: 100 } }
    rate_infos { key: 32 value { clock_rate_ghz: 2 units_per_core: 4 ops_per_clock: 400 } }
    rate_infos { key: 99 value { clock_rate_ghz: 2 units_per_core: 4 ops_per_clock: 1 } }
  }
  name: "NVIDIA B\\"300"
}
platform_name: "CUDA"
device_description_str: "NVIDIA B300"
"""


class TestTargets:
    def test_a_description_is_read(self):
        found = targets.from_fields(targets.parse(PROTO), PROTO)
        assert (found.name, found.maker_name) == ("b300", "NVIDIA B300")
        assert found.capability == (10, 3) and found.arch == "sm_103a" and found.tmem_columns == 512
        assert found.num_sms == 7 and found.clock_hz == 1.5e9 and found.memory_bandwidth == 2e12
        # 7 SMs * 4 units * 100 multiply-adds a clock * 2 GHz * 2 operations
        assert found.matrix_flops == {
            "bfloat16": 7 * 4 * 100 * 4e9,
            "float4_e2m1fn": 7 * 4 * 400 * 4e9,
        }
        assert found.device.capability == (10, 3) and found.device.num_sms == 7

    @pytest.mark.parametrize(
        ("capability", "arch", "columns"),
        [
            ((8, 0), "sm_80", 0),
            ((8, 6), "sm_86", 0),
            ((9, 0), "sm_90a", 0),
            ((12, 0), "sm_120a", 0),
        ],
    )
    def test_architectures(self, capability, arch, columns):
        found = targets.from_fields(targets.parse(PROTO), PROTO)
        found = dataclasses.replace(found, capability=capability)
        assert found.arch == arch and found.tmem_columns == columns

    @pytest.mark.parametrize("text", ["a: 1 }", "a {", "a:", "{ }", "a: 1 b"])
    def test_what_is_no_message_is_refused(self, text):
        with pytest.raises(ValueError):
            targets.parse(text)

    def test_descriptions_are_found_in_a_shared_object(self, tmp_path):
        library = tmp_path / "plugin.so"
        body = PROTO.strip().partition("\n")[2].encode()
        library.write_bytes(
            b"\x7fELF\0\1" + body + b"\0 noise gpu_device_info { \0" + body + b"# C"
        )
        found = list(targets.embedded(library))
        assert len(found) == 2 and all(targets.parse(text) for text in found)

    @needs_aot
    def test_the_installed_plugin_describes_every_gpu_that_kernels_are_for(self):
        found = aot.targets()
        assert list(found)[: len(targets.SHORT_NAMES)] == list(targets.SHORT_NAMES)
        capabilities = {name: found[name].capability for name in targets.SHORT_NAMES}
        assert capabilities == {
            "b200": (10, 0),
            "gb200": (10, 0),
            "b300": (10, 3),
            "gb300": (10, 3),
            "vr200": (10, 7),
            "h100": (9, 0),
            "h200": (9, 0),
            "a100": (8, 0),
            "rtx_pro_6000": (12, 0),
            "a6000": (8, 6),
        }
        for target in found.values():
            assert target.num_sms > 0 and target.l2_bytes > 2**20, target
            assert 1e11 < target.memory_bandwidth < 1e14, target
        known = machine_code.architectures()
        assert {found[name].arch for name in targets.SHORT_NAMES} <= known


SASS = textwrap.dedent("""
    .text.kernel:
            /*0000*/                   LDC R1, c[0x0][0x37c] ;
            /*0010*/               @P1 BRA `(.L_x_9) ;
    .L_x_1:
            /*0020*/                   UTMALDG.3D [UR8], [UR16] ;
    .L_x_2:
            /*0030*/                   UTCCP.T.S.4x32dp128bit tmem[UR6], gdesc[UR18] ;
            /*0040*/                   UTCOMMA.4X gdesc[UR8], gdesc[UR26], tmem[UR48], UPT ;
            /*0050*/              @!P2 SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR9], R5 ;
            /*0060*/                   UTCOMMA.4X gdesc[UR8], gdesc[UR26], tmem[UR48], UPT ;
            /*0070*/              @!P3 BRA `(.L_x_2) ;
            /*0080*/                   BRA.U UP0, `(.L_x_1) ;
    .L_x_9:
            /*0090*/                   UTCOMMA.4X gdesc[UR8], gdesc[UR26], tmem[UR48], UPT ;
            /*00a0*/                   EXIT ;
""")
MMA = "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X"


class TestMachineCode:
    def test_instructions_and_loops(self):
        kernel = Kernel("k", "sm_100a", "", SASS)
        assert kernel.opcodes["UTCOMMA.4X"] == 3 and kernel.opcodes["BRA"] == 2
        assert kernel.opcodes["SYNCS.PHASECHK.TRANS64.TRYWAIT"] == 1
        assert kernel.sass_count("UTC") == 4 and kernel.sass_count("UTCOMMA$") == 0
        assert len(machine_code.loops(SASS)) == 2
        assert kernel.per_step("UTCOMMA") == 2  # the third is behind the loop
        assert kernel.per_step("UTMALDG") == 1  # in the outer loop
        assert kernel.per_step("EXIT") == 0

    def test_tensor_memory(self):
        alloc = "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r53], "
        text = f"mov.b32 \t%r40, 512;\n{alloc}%r40;\n{alloc}32;\ntcgen05.dealloc.b32 %r1, %r40;"
        assert machine_code.allocated_tmem(text) == 544
        with pytest.raises(ValueError, match="no constant"):
            machine_code.allocated_tmem(alloc + "%r41;")

    @needs_aot
    def test_a_kernel_is_assembled_and_spills_are_seen(self):
        kernel = machine_code.assemble(pressed(registers=64), shared_bytes=100)
        assert kernel.name == "pressed" and kernel.arch == "sm_90a" and kernel.threads == 128
        assert kernel.registers <= 64 and kernel.spill_bytes == 0 and kernel.shared_bytes == 100
        assert expect.no_spills(compiled(kernel)) == []
        spilled = machine_code.assemble(pressed(registers=24))
        assert spilled.registers <= 24 and spilled.spill_bytes > 0
        (problem,) = expect.no_spills(compiled(spilled))
        assert "bytes spilled" in problem and "loads and stores of local memory" in problem

    @needs_aot
    def test_what_ptxas_says_is_passed_on(self):
        with pytest.raises(RuntimeError, match=r"ptxas.* failed: .*not_an_instruction"):
            machine_code.assemble(pressed(64).replace("ret;", "not_an_instruction;\nret;"))
        with pytest.raises(ValueError, match="one entry function"):
            machine_code.assemble(pressed(64).replace(".entry", ".func"))


def pressed(registers):
    """A kernel that has 40 values at a time, and so many registers."""
    loads = "\n".join(f"ld.volatile.global.u32 %r{i}, [%rd1+{4 * i}];" for i in range(40))
    stores = "\n".join(f"st.volatile.global.u32 [%rd1+{4 * i}], %r{i};" for i in range(40))
    return (
        f".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry pressed(.param .u64 p)\n"
        f".maxntid 128, 1, 1\n.maxnreg {registers}\n{{\n.reg .b32 %r<40>;\n.reg .b64 %rd<2>;\n"
        f"ld.param.u64 %rd1, [p];\n{loads}\nbar.sync 0;\n{stores}\nret;\n}}\n"
    )


def compiled(*kernels, hlo="", temp=0):
    """What the compiler might have made for a B300."""
    target = targets.from_fields(targets.parse(PROTO), PROTO)
    return aot.Compiled(target, kernels, hlo, aot.Memory(0, 0, 0, temp), 0.0)


def sass(*loop):
    """Instructions in a loop."""
    lines = [
        f"        /*{16 * i:04x}*/  {name} ;" for i, name in enumerate((*loop, "BRA `(.L_x_1)"))
    ]
    return "\n".join([".L_x_1:", *lines])


GOOD = Kernel(
    name="grouped",
    arch="sm_103a",
    ptx=f"{MMA};\n{MMA};\ntcgen05.cp.cta_group::1.32x128b;\n",
    sass=sass("UTMALDG.3D", "UTMALDG.4D", "UTCCP.T.S", "UTCOMMA.4X", "UTCOMMA.4X"),
    registers=96,
    threads=256,
    shared_bytes=2000,
    tmem_columns=512,
)
OUTSIDE = "\n        /*ff00*/  {} ;"
HOPPER = dataclasses.replace(
    GOOD,
    ptx="wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16;",
    sass=sass("HGMMA.64x128x16.F32.BF16"),
)
BAD = {
    "a missing MMA": (
        expect.block_scaled_mma("nvfp4", 2),
        {"ptx": f"{MMA};", "sass": sass("UTCOMMA.4X")},
        "1 UTCOMMA instead of 2",
    ),
    "MXFP4's MMA for NVFP4": (
        expect.block_scaled_mma("nvfp4", 2),
        {"ptx": f"{MMA[:-2]}2X;" * 2, "sass": sass("UTCOMMA", "UTCOMMA")},
        "0 UTCOMMA with .4X instead of 2",
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


KERNEL_CALL = 'custom_call_target="mosaic_gpu_v2"'
# One packed operand through a bitcast, one that is unpacked, one that a loop slices for a fused call, and rows.
HLO = textwrap.dedent(f"""\
    HloModule jit_f, is_scheduled=true

    %unpack (p: u8[8,4]) -> f4e2m1fn[8,8] {{
      %p = u8[8,4]{{1,0}} parameter(0)
      ROOT %convert = f4e2m1fn[8,8]{{1,0:E(4)}} convert(%p)
    }}

    %sliced (p0: u8[3,8,4], p1: s32[]) -> bf16[8] {{
      %p0 = u8[3,8,4]{{2,1,0}} parameter(0)
      %p1 = s32[] parameter(1)
      %slice = u8[1,8,4]{{2,1,0}} dynamic-slice(%p0, %p1), dynamic_slice_sizes={{1,8,4}}
      %cast = f4e2m1fn[8,8]{{1,0:E(4)}} bitcast(%slice)
      ROOT %call = bf16[8]{{0}} custom-call(%cast), {KERNEL_CALL}
    }}

    %body (arg: (s32[], u8[3,8,4])) -> (s32[], u8[3,8,4]) {{
      %arg = (s32[], u8[3,8,4]{{2,1,0}}) parameter(0)
      %i = s32[] get-tuple-element(%arg), index=0
      %w = u8[3,8,4]{{2,1,0}} get-tuple-element(%arg), index=1
      %y = bf16[8]{{0}} fusion(%w, %i), kind=kCustom, calls=%sliced
      ROOT %next = (s32[], u8[3,8,4]{{2,1,0}}) tuple(%i, %w)
    }}

    ENTRY %main (a: u8[8,4], b: u8[8,4], c: u8[3,8,4], d: u8[8,4]) -> bf16[8] {{
      %a.1 = u8[8,4]{{1,0}} parameter(0), sharding={{mesh['x'=1], [{{}}]}}, metadata={{op_name="args[0].codes"}}
      %b.1 = u8[8,4]{{1,0}} parameter(1), metadata={{op_name="args[1].codes"}}
      %c.1 = u8[3,8,4]{{2,1,0}} parameter(2), metadata={{op_name="args[2]"}}
      %d.1 = u8[8,4]{{1,0}} parameter(3), metadata={{op_name="args[3]"}}
      %zero = s32[] constant(0)
      %cast.1 = f4e2m1fn[8,8]{{1,0:E(4)}} bitcast(%a.1), metadata={{op_name="x(y)"}}
      %fused = f4e2m1fn[8,8]{{1,0:E(4)}} fusion(%b.1), kind=kLoop, calls=%unpack
      %start = (s32[], u8[3,8,4]{{2,1,0}}) tuple(%zero, /*index=1*/%c.1)
      %loop = (s32[], u8[3,8,4]{{2,1,0}}) while(%start), condition=%cond, body=%body
      ROOT %out = bf16[8]{{0}} custom-call(%cast.1, %fused), {KERNEL_CALL}, backend_config="(%b.1)"
    }}
""")


class TestHlo:
    def test_uses_are_followed(self):
        program = hlo_text.parse(HLO)
        uses = {p.source: program.uses(p) for p in program.parameters}
        assert list(uses) == ["args[0].codes", "args[1].codes", "args[2]", "args[3]"]
        names = {source: [use.name for use in found] for source, found in uses.items()}
        assert names["args[0].codes"] == ["out"]  # through the bitcast
        assert names["args[1].codes"] == ["fused"]
        assert names["args[2]"] == ["call"]  # through the tuple, the loop, the fusion and its slice
        assert names["args[3]"] == []

    def test_unpacking_in_xla_is_a_problem(self):
        program = compiled(GOOD, hlo=HLO)
        assert expect.packed_as_they_are("args[0]", "args[2]")(program) == []
        assert expect.packed_as_they_are("args[1]")(program) == [
            "packed args[1].codes u8[8,4] is read by fusion fused"
        ]
        assert expect.packed_as_they_are("args[3]")(program) == [
            "packed args[3] u8[8,4] is not read"
        ]
        assert len(expect.packed_as_they_are()(program)) == 2
        assert expect.packed_as_they_are("args[7]")(program) == ["no packed parameter args[7]"]

    def test_another_custom_call_is_no_kernel(self):
        hlo = HLO.replace("mosaic_gpu_v2", "__cublas$gemm")
        assert expect.packed_as_they_are("args[0]")(compiled(GOOD, hlo=hlo)) == [
            "packed args[0].codes u8[8,4] is read by custom-call out"
        ]

    def test_a_scan_that_copies_its_slice_is_a_problem(self):
        hlo = HLO.replace(f"custom-call(%cast), {KERNEL_CALL}", "convert(%cast)")
        assert expect.packed_as_they_are("args[2]")(compiled(GOOD, hlo=hlo)) == [
            "packed args[2] u8[3,8,4] is read by fusion y"
        ]

    def test_what_is_no_program_is_refused(self):
        with pytest.raises(ValueError, match="no entry computation"):
            hlo_text.parse("HloModule empty")


@needs_aot
class TestProcesses:
    def test_a_real_program_and_one_that_unpacks_in_xla(self):
        names = ["as_they_are", "unpacked"]
        found = aot.in_process("b200", "tests.aot_children:controls", names, timeout=300)
        good, bad = (runner._from_plain(values) for values in found)
        assert good.problems == () and good.temp_bytes == 0 and good.arch == "sm_100a"
        (facts,) = good.kernels
        assert facts.kernel == "halve" and facts.tma_loads == 1 and facts.threads == 128
        # Two buffers of 64 x 256 bfloat16, and a barrier
        assert 65536 < facts.shared_bytes < 66000
        (problem,) = bad.problems
        assert problem.startswith("packed args[0] u8[64,256,2] is read by fusion")

    def test_a_process_that_dies_says_so_and_its_results_are_kept(self):
        found = aot.in_process("h100", "tests.aot_children:die", {"a": [1]})
        assert next(found) == {"target": "h100", "arguments": {"a": [1]}}
        with pytest.raises(RuntimeError, match="for h100 ended: signal 6\nabout to end"):
            next(found)

    def test_a_process_that_hangs_is_ended(self):
        found = aot.in_process("h100", "tests.aot_children:hang", None, timeout=0.5)
        with pytest.raises(RuntimeError, match="for h100 ended: longer than 0.5 s"):
            next(found)


class TestCases:
    def test_names_of_a_family_differ(self):
        case = cases.Case(
            name="a", format="nvfp4", runs_on=bool, build=lambda _: None, expectations=()
        )
        with pytest.raises(ValueError, match="two cases called a nvfp4"):
            cases.Family(name="f", about="", interpreted="", cases=(case, case))

    def test_every_family_has_cases_for_some_gpu_and_says_what_is_proven(self):
        for name, family in cases.families().items():
            assert family.name == name and family.cases and family.about and family.interpreted

    @needs_aot
    def test_twins_compile_only_what_is_for_each_gpu(self):
        b200, gb200, h100 = (aot.targets()[name] for name in ("b200", "gb200", "h100"))
        together = runner.cases_for([b200, gb200, h100], ["mosaic_sm100"])
        alone = runner.cases_for([gb200], ["mosaic_sm100"])
        assert len(together["b200"]) == len(alone["gb200"]) > len(together["gb200"]) > 0
        assert together["h100"] == []

    @needs_aot
    def test_a_case_that_ends_its_process_fails_alone(self, monkeypatch):
        def in_process(target, function, chunk):
            for family, index in chunk:
                if index == 1:
                    raise RuntimeError("ended: signal 6")
                yield dataclasses.asdict(
                    runner._failed(aot.targets()[target], family, index, "", 0)
                )

        monkeypatch.setattr(aot, "in_process", in_process)
        chunk = [("mosaic_sm100", index) for index in range(4)]
        found = list(runner._in_processes("b200", chunk))
        assert [result.problems for result in found] == [("",), ("ended: signal 6",), ("",), ("",)]
