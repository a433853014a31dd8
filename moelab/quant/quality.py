"""How a quantized model differs from the one that it was made of, on the same documents.

M MoE layers, E experts, D documents.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moelab import evaluate, metrics
from moelab import model as model_lib
from moelab.errors import ConfigError
from moelab.quant import noise, quality_layers
from moelab.quant import quality_steps as steps
from moelab.report import statistics


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with its variables, in the precision that is to be judged.

    Attributes:
      name: of the row.
      model: from evaluate.in_precision.
      variables: params, router_state and, where activations are quantized, the collection `quantized`.
    """

    name: str
    model: model_lib.Transformer
    variables: dict


def compare(
    config, dataset, split: str, reference: Subject, subjects: Sequence[Subject]
) -> list[dict[str, Any]]:
    """Runs the evaluation batches of a split through the reference and each subject, and describes the differences.

    Args:
      config: of the run.
      dataset: data.Dataset.
      split: validation or test.
      reference: the high-precision model.
      subjects: quantized ones.

    Returns:
      Per subject: name; loss and bits_per_byte of both and their difference with a 95 % interval (paired bootstrap over
      documents); kl (nats per token of KL(reference || subject): mean, p99); router, per MoE layer: overlap (share of
      the reference's choices that the subject makes too), same_order, gate_kl, max_violation before and after;
      output_sqnr_db per MoE layer and experts (tokens, load, SQNR of each expert's output on the reference's rows),
      load_error_rank (Spearman's correlation of load and relative error).

    Raises:
      ConfigError: the run has no routed experts.
    """
    if not model_lib.moe_layers(config) or config.moe.slots_per_expert:
        raise ConfigError("a quality report wants a run with experts that a router chooses")
    tallies = [_Tally(reference, subject) for subject in subjects]
    see = steps.make_seeing(reference.model, rows=True)
    seeing = {s.model: steps.make_seeing(s.model, rows=False) for s in subjects}
    part = dataset.split(split)
    for batch in evaluate.batches_of(config, dataset, split):
        seen = see(reference.variables, batch)
        for tally in tallies:
            other = seeing[tally.subject.model](tally.subject.variables, batch)
            tally.add(seen, other, batch, len(part))
    return [tally.result(part, dataset.domains, config) for tally in tallies]


class _Layer(NamedTuple):
    """A MoE layer: its config, and its experts' weights as experts.apply takes them."""

    config: Any
    weights: dict

    @property
    def precision(self):
        """Of the experts' matmuls."""
        return self.config.precision


def _layers(subject: Subject) -> list[_Layer]:
    """The MoE layers in the order of the blocks."""
    blocks = [b for s in subject.model.segments for _ in range(s.count) for b in s.blocks]
    configs = [block.moe for block in blocks if block.moe is not None]
    variables = subject.variables
    quantized = variables["quantized"] if "quantized" in variables else {}
    experts = noise.experts_of(variables["params"], quantized)
    return [_Layer(*pair) for pair in zip(configs, experts, strict=True)]


class _Tally:
    """Adds up what the batches say of one subject; sums are float64."""

    def __init__(self, reference: Subject, subject: Subject):
        self._pair, self.subject = (reference, subject), subject
        self._layers = [_layers(side) for side in self._pair]
        self._sums: dict[str, Any] = {}
        self._kl: list[np.ndarray] = []

    def add(self, seen: steps.Seen, other: steps.Seen, batch, num_documents: int) -> None:
        """Adds one batch."""
        mask_BL = np.asarray(batch.mask_BL)
        pair = (
            (side.hidden_TD, model_lib.head(owner.model, owner.variables["params"]))
            for side, owner in zip((seen, other), self._pair, strict=True)
        )
        *nats, kl_T = jax.device_get(steps.outputs(*pair, jnp.asarray(batch.target_BL.reshape(-1))))
        self._kl.append(kl_T[mask_BL.reshape(-1)])
        for name, nats_T in zip(("reference", "subject"), nats, strict=True):
            by_document = evaluate.by_document(nats_T.reshape(mask_BL.shape), batch, num_documents)
            self._add(f"{name}_nats_D", by_document[0])
        self._add("count_D", by_document[1])
        slots = self._layers[0][0].config.router.slots
        routes = steps.routes(seen, other, jnp.asarray(mask_BL.reshape(-1)), slots)
        for name, value in jax.device_get(routes)._asdict().items():
            self._add(name, value)
        self._add_layers(seen, other)

    def _add_layers(self, seen: steps.Seen, other: steps.Seen) -> None:
        found = []
        for m, pair in enumerate(zip(*self._layers, strict=True)):
            routing = (seen.token_MN[m], seen.expert_MN[m], seen.weight_MN[m])
            weights, precisions = (
                [getattr(layer, n) for layer in pair] for n in ("weights", "precision")
            )
            errors = quality_layers.layer_errors(
                seen.x_MTD[m], routing, *weights, tuple(precisions)
            )
            found.append(jax.device_get(errors))
        num_experts = self._layers[0][0].config.router.num_experts
        for name in quality_layers.Errors._fields:
            self._add(name, np.stack([getattr(errors, name) for errors in found]))
        for name, side in (("load_before_ME", seen), ("load_after_ME", other)):
            load = [
                np.bincount(e, minlength=num_experts)[:num_experts]
                for e in np.asarray(side.expert_MN)
            ]
            self._add(name, np.stack(load))

    def _add(self, name: str, value: np.ndarray) -> None:
        self._sums[name] = self._sums.get(name, 0) + np.asarray(value, np.float64)

    def result(self, part, domains: Sequence[str], config) -> dict[str, Any]:
        """Describes the sums."""
        kl = np.concatenate(self._kl).astype(np.float64)
        return {
            "name": self.subject.name,
            "tokens": int(kl.size),
            "documents": int((self._sums["count_D"] > 0).sum()),
            **self._losses(part, domains),
            "columns": self._columns(part, domains),
            "kl": {"mean": float(kl.mean()), "p99": float(np.percentile(kl, 99))},
            "layers": model_lib.moe_layers(config),
            "router": self._router(config),
            **self._experts(),
        }

    def _losses(self, part, domains: Sequence[str]) -> dict[str, Any]:
        sums = self._sums
        used = sums["count_D"] > 0
        nats = [sums[f"{name}_nats_D"] for name in ("reference", "subject")]
        pair = [nats_D[used] for nats_D in nats]
        tokens, nbytes = sums["count_D"][used], part.num_bytes_N[used].astype(np.float64)
        domain_D = part.domain_N[used]
        loss = statistics.ratio_difference(*pair, tokens, domain_D)
        result = {
            "loss": [float(n.sum() / tokens.sum()) for n in pair],
            "loss_difference": loss._asdict(),
            "bits_per_byte": [
                evaluate.bits_per_byte(_Nats(nats_D, sums["count_D"]), part, domains)
                for nats_D in nats
            ],
            "bits_per_byte_difference": None,  # nobody knows the bytes of token files without a tokenizer
        }
        if (nbytes > 0).all():
            bits = statistics.ratio_difference(*pair, nbytes * math.log(2), domain_D)
            result["bits_per_byte_difference"] = bits._asdict()
        return result

    def _columns(self, part, domains: Sequence[str]) -> dict[str, list]:
        """The columns of documents.parquet for the reference and the subject."""
        columns: dict[str, list] = {}
        names = (self._pair[0].name, self.subject.name)
        for side, name in zip(("reference", "subject"), names, strict=True):
            sums = self._sums[f"{side}_nats_D"], self._sums["count_D"]
            evaluate.add_documents(columns, name, *sums, part, domains)
        return columns

    def _router(self, config) -> dict[str, Any]:
        sums, tokens = self._sums, self._sums["tokens"]
        slots = self._layers[0][0].config.router.slots
        return {
            "overlap": (sums["both_M"] / np.maximum(sums["chosen_M"], 1)).tolist(),
            "same_order": None if slots is None else (sums["same_order_M"] / tokens).tolist(),
            "gate_kl": (sums["kl_M"] / tokens).tolist(),
            "max_violation_before": metrics.max_violation(sums["load_before_ME"]).tolist(),
            "max_violation_after": metrics.max_violation(sums["load_after_ME"]).tolist(),
        }

    def _experts(self) -> dict[str, Any]:
        sums = self._sums
        rows_ME, layers = sums["rows_E"], []
        for rows_E, power_E, error_E in zip(rows_ME, sums["power_E"], sums["error_E"], strict=True):
            layers.append(
                {
                    "tokens": rows_E.astype(int).tolist(),
                    "load": (rows_E / max(rows_E.sum(), 1)).tolist(),
                    "sqnr_db": [noise.sqnr(*pair) for pair in zip(power_E, error_E, strict=True)],
                }
            )
        return {
            "output_sqnr_db": [
                noise.sqnr(*pair) for pair in zip(sums["power"], sums["error"], strict=True)
            ],
            "experts": layers,
            "load_error_rank": [
                noise.rank_correlation(*triple)
                for triple in zip(rows_ME, sums["power_E"], sums["error_E"], strict=True)
            ],
        }


@dataclasses.dataclass(frozen=True)
class _Nats:
    """What evaluate.bits_per_byte reads of a Measured."""

    nats_D: np.ndarray
    token_count_D: np.ndarray
