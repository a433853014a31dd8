"""Experts of published models: routed experts, experts per token, model width D, expert width F, as in their configs.

Sources: Mixtral arXiv:2401.04088; OLMoE arXiv:2409.02060; Qwen3 arXiv:2505.09388; gpt-oss arXiv:2508.10925; DeepSeek-V3
arXiv:2412.19437; Kimi K2 arXiv:2507.20534.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Experts:
    """One model's sparse layer."""

    experts: int
    k: int
    width: int
    hidden: int

    def layers(self, multiple: int = 256) -> dict[str, tuple[int, int]]:
        """Returns (outputs, inputs) of gate_up and down, widths padded to a multiple, as weights are when loaded."""
        width, hidden = (-(-size // multiple) * multiple for size in (self.width, self.hidden))
        return {"gate_up": (2 * hidden, width), "down": (width, hidden)}


MODELS = {
    "mixtral_8x7b": Experts(8, 2, 4096, 14336),
    "mixtral_8x22b": Experts(8, 2, 6144, 16384),
    "olmoe": Experts(64, 8, 2048, 1024),
    "qwen3_30b": Experts(128, 8, 2048, 768),
    "qwen3_235b": Experts(128, 8, 4096, 1536),
    "gpt_oss_120b": Experts(128, 4, 2880, 2880),
    "deepseek_v3": Experts(256, 8, 7168, 2048),
    "kimi_k2": Experts(384, 8, 7168, 2048),
}
