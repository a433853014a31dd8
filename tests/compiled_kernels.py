"""What the compiler might have made, as values, and a GPU that was never built."""

import dataclasses

from pallas_kernels import aot, targets
from pallas_kernels.machine_code import Kernel

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
MMA = "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X"


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


LOAD = "cp.async.bulk.tensor.4d.shared::cta.global.mbarrier::complete_tx::bytes [%r1];\n"
GOOD = Kernel(
    name="grouped",
    arch="sm_103a",
    ptx=f"{MMA};\n{MMA};\ntcgen05.cp.cta_group::1.32x128b;\n" + 2 * LOAD,
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
