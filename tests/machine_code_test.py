"""Descriptions of GPUs, machine code, and the text of compiled programs."""

import dataclasses
import textwrap

import pytest
from compiled_kernels import GOOD, PROTO, compiled

from pallas_kernels import aot, hlo_text, machine_code, targets
from pallas_kernels.machine_code import Kernel
from pallas_kernels.verify import expect

needs_aot = pytest.mark.skipif(bool(aot.missing()), reason=aot.missing() or "installed")


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
