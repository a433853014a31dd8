"""Matmuls whose rows are grouped by expert, and the expert feed-forward built on them.

`reference.py` defines the numerics; every other backend is compared with it.
"""

from pallas_kernels.grouped_matmul.activation import GPT_OSS, SWIGLU, SwiGLU
from pallas_kernels.grouped_matmul.api import (
    expert_mlp,
    grouped_matmul,
    quantized_grouped_matmul,
    quantized_matmul,
)
from pallas_kernels.grouped_matmul.choice import BACKENDS, IMPLEMENTATIONS
from pallas_kernels.grouped_matmul.dispatch import routed_expert_mlp
from pallas_kernels.grouped_matmul.precision import MatmulPrecision, MlpPrecision

__all__ = [
    "BACKENDS",
    "GPT_OSS",
    "IMPLEMENTATIONS",
    "MatmulPrecision",
    "MlpPrecision",
    "SWIGLU",
    "SwiGLU",
    "expert_mlp",
    "grouped_matmul",
    "quantized_grouped_matmul",
    "quantized_matmul",
    "routed_expert_mlp",
]
