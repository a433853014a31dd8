"""Numerics below the library: block-scaled formats and grouped matmuls. Knows jax, nothing of moelab.

`pallas_kernels.grouped_matmul` is the function. The folder of that name is reached with
`from pallas_kernels.grouped_matmul import ...`.
"""

from pallas_kernels.grouped_matmul import (
    BACKENDS,
    GPT_OSS,
    IMPLEMENTATIONS,
    SWIGLU,
    MatmulPrecision,
    MlpPrecision,
    SwiGLU,
    expert_mlp,
    grouped_matmul,
    quantized_grouped_matmul,
    quantized_matmul,
    routed_expert_mlp,
)

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
