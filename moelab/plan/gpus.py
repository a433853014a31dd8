"""The figures of GPUs: dense peaks, memory, links, power, with the contradictory values that circulate.

All is per GPU and per direction. Sparse peaks are quoted as dense in many places: they stand among the others.
"""

from __future__ import annotations

from moelab.plan.figures import Figure, Source

_WHEEL = "aiconfigurator-core 0.12.0, systems/{}.yaml"
_READ = "2026-11-29"
_SPARSE = "NVIDIA's data sheets print the sparse peak in the same table; often quoted as dense"
MEMORY = Source("moelab fact sheet on hardware, from memory", "2026-11", "unverified")
INFERENCEX = Source("InferenceX blogs on the links of its clusters", "2026", "third party")
VERDA = Source("verda.com/blog/gb300-nvl72-architecture", "2026", "third party")
LOCKWOOD = Source("glennklockwood.com/garden/processors/B300", "2026", "third party")


def _wheel(name: str, cites: str = "") -> Source:
    return Source(_WHEEL.format(name) + (f" (cites {cites})" if cites else ""), _READ)


_A100, _H100, _H200 = _wheel("a100_sxm"), _wheel("h100_sxm"), _wheel("h200_sxm")
_B200 = _wheel("b200_sxm", "NVIDIA's Blackwell data sheet")
_B300 = _wheel("b300_sxm", "NVIDIA's Blackwell Ultra data sheet")
_GB200 = _wheel("gb200", "NVIDIA's Blackwell data sheet")
_GB300 = _wheel("gb300", "NVIDIA's Blackwell Ultra data sheet")
_PRO = _wheel("rtx_pro_6000_server")
_GPU_PAGE = Source("NVIDIA's product page of the GPU, by the moelab fact sheet", "2026-11")


def _peaks(source: Source, bf16: float, fp8=None, fp4=None, /, **others) -> dict[str, Figure]:
    """Dense FLOP/s in units of 1e12; None: the GPU has no such tensor cores."""
    values = {"bf16": bf16, "fp8": fp8, "fp4": fp4}
    return {
        name: Figure(value * 1e12, "FLOP/s", source, tuple(others.get(name, ())))
        for name, value in values.items()
        if value is not None
    }


def _fields(source: Source, memory, bandwidth, nvlink, domain, nic, power, /, **changed) -> dict:
    """Memory in GB, bandwidth in TB/s, links in GB/s per direction, power in W."""
    table = {
        "memory": (memory * 1e9, "B"),
        "bandwidth": (bandwidth * 1e12, "B/s"),
        "nvlink": (nvlink * 1e9, "B/s"),
        "domain": (domain, "GPUs"),
        "nic": (nic * 1e9, "B/s"),
        "power": (power, "W"),
    }
    figures = {}
    for name, (value, unit) in table.items():
        others, where = changed.get(name, ((), source))
        figures[name] = Figure(value, unit, where, tuple(others))
    return figures


_GIB = "the wheel's file takes GB for GiB, 7 % too much"
_LINK = "both directions together, as in 'NVLink 1.8 TB/s'"
_H100_PEAKS = _peaks(
    _H100,
    989,
    1978,
    bf16=((1.979e15, _SPARSE),),
    fp8=((1.979e15, "rounded"), (3.958e15, _SPARSE)),
)
_CX8 = (1e11, "the wheel's file assumes CX8 at 800 Gb/s")

# name -> (what it is called, architecture, compute capability, peaks, the other fields)
TABLE = {
    "a100": (
        "A100 SXM 80 GB",
        (8, 0),
        _peaks(_A100, 312),
        _fields(_A100, 80, 2.039, 300, 8, 25, 400, memory=(((85.9e9, _GIB),), _GPU_PAGE)),
    ),
    "h100": (
        "H100 SXM",
        (9, 0),
        _H100_PEAKS,
        _fields(
            *(_H100, 80, 3.35, 450, 8, 50, 700),
            memory=(((85.9e9, _GIB),), _GPU_PAGE),
            nvlink=(((9e11, _LINK),), _H100),
        ),
    ),
    "h800": (
        "H800 SXM",
        (9, 0),
        _H100_PEAKS,
        _fields(
            *(_H100, 80, 3.35, 200, 8, 50, 700),
            memory=((), _GPU_PAGE),
            nvlink=(((4.5e11, "that of an H100"),), MEMORY),
        ),
    ),
    "h200": (
        "H200 SXM",
        (9, 0),
        _H100_PEAKS,
        _fields(*(_H200, 141, 4.8, 450, 8, 50, 700), memory=(((151.4e9, _GIB),), _GPU_PAGE)),
    ),
    "b200": (
        "B200 HGX",
        (10, 0),
        _peaks(
            *(_B200, 2250, 4500, 9000),
            bf16=((4.5e15, _SPARSE),),
            fp8=((9e15, _SPARSE),),
            fp4=((1.8e16, _SPARSE), (1e16, "the bin of GB200")),
        ),
        _fields(
            *(_B200, 180, 7.7, 900, 8, 50, 1000),
            memory=(((193.3e9, _GIB), (192e9, "of the chip, not usable on HGX")), _GPU_PAGE),
            bandwidth=(((8e12, "DGX B200: 64 TB/s over 8"), (7.75e12, "62 TB/s over 8")), _B200),
            nvlink=(((1.8e12, _LINK),), _B200),
            nic=((_CX8,), INFERENCEX),
        ),
    ),
    "b300": (
        "B300 HGX",
        (10, 3),
        _peaks(
            *(_B300, 2250, 4500, 14000),
            bf16=((4.5e15, _SPARSE),),
            fp8=((9e15, _SPARSE),),
            fp4=((1.3e16, "13 PF in NVIDIA's blog"), (1.3125e16, "by clock"), (1.8e16, _SPARSE)),
        ),
        _fields(
            *(_B300, 268, 7.75, 900, 8, 100, 1100),
            memory=(
                ((288.4e9, "nvidia-smi, in the wheel"), (270e9, "HGX"), (288e9, "raw")),
                LOCKWOOD,
            ),
            bandwidth=(((8e12, "DGX"), (7.7e12, "HGX, rounded")), _B300),
        ),
    ),
    "gb200": (
        "GB200 NVL72",
        (10, 0),
        _peaks(
            *(_GB200, 2500, 5000, 10000),
            bf16=((5e15, _SPARSE),),
            fp8=((1e16, _SPARSE),),
            fp4=((2e16, _SPARSE), (9e15, "the bin of B200 HGX")),
        ),
        _fields(
            *(_GB200, 186, 8.0, 900, 72, 50, 1200),
            memory=(
                ((198.7e9, "nvidia-smi, in the wheel"), (192e9, "raw"), (129e9, "a typing error")),
                VERDA,
            ),
            nvlink=(((1.8e12, _LINK),), _GB200),
            nic=((_CX8,), INFERENCEX),
        ),
    ),
    "gb300": (
        "GB300 NVL72",
        (10, 3),
        _peaks(
            *(_GB300, 2500, 5000, 15000),
            bf16=((5e15, _SPARSE),),
            fp8=((1e16, _SPARSE),),
            fp4=((2e16, _SPARSE + "; some pages swap the two"),),
        ),
        _fields(
            *(_GB300, 278, 8.0, 900, 72, 100, 1400),
            memory=(((298.0e9, "nvidia-smi, in the wheel"), (288e9, "raw")), VERDA),
        ),
    ),
    "rtx_pro_6000": (
        "RTX PRO 6000 Blackwell (600 W)",
        (12, 0),
        _peaks(
            *(_PRO, 467.8, 935.6, 1871.2),
            bf16=((5.03e14, "at a higher clock"),),
            fp8=((1.007e15, "at a higher clock"),),
            fp4=((2.015e15, "at a higher clock"),),
        ),
        _fields(
            *(_PRO, 96, 1.792, 64, 1, 50, 600),
            memory=(((102.6e9, "nvidia-smi, in the wheel"),), _GPU_PAGE),
            nvlink=(((0.0, "it has no NVLink: this is PCIe 5.0 x16"),), _PRO),
            bandwidth=(((1.6e12, "Server Edition, unverified"),), _PRO),
        ),
    ),
    "rtx_5090": (
        "RTX 5090",
        (12, 0),
        _peaks(
            *(MEMORY, 210, 419, 1676),
            fp8=((8.38e14, "accumulating in float16"),),
            fp4=((3.352e15, "sparse TOPS of NVIDIA's page"),),
        ),
        _fields(
            *(_GPU_PAGE, 32, 1.792, 64, 1, 50, 575),
            nvlink=(((0.0, "it has no NVLink: this is PCIe 5.0 x16"),), _GPU_PAGE),
            nic=((), Source("assumed: one 400 Gb/s card", _READ, "assumed")),
        ),
    ),
}
