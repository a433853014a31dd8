"""Group-limited token choice: a token's experts come from few groups, say the devices of a cluster.

    group score = max, or sum of the two largest, of (score + bias) in the group
    S = top-k of (score + bias) inside the best groups; the other columns are -inf

DeepSeek-V2 ranks groups by their maximum (arXiv:2405.04434, section 2.2.2), DeepSeek-V3 by the sum of their top two
with the balancing bias (arXiv:2412.19437, section 2.1.2, and the authors' code). Hugging Face masks with 0 instead of
-inf, so that a masked expert can beat one whose biased score is negative.
"""

from __future__ import annotations

import jax

from moelab import router, routing, scores
from moelab.routers import top_k


class Router(top_k.Router):
    """Selects k experts per token within its best groups of experts."""

    score: str = "sigmoid"  # softmax over the experts, or sigmoid or sqrt_softplus of each logit
    num_groups: int = 2  # groups of neighbouring experts; divides num_experts
    groups_per_token: int = 1  # groups that a token's experts come from
    group_score: str = "sum_top2"  # sum_top2 (DeepSeek-V3) or max (DeepSeek-V2)

    def pick(
        self, rank_TC: jax.Array, bias_C: jax.Array | None, inputs: routing.RouterInput
    ) -> jax.Array:
        """Returns the k best columns of the best groups."""
        if bias_C is not None:
            rank_TC = rank_TC + bias_C[None, :]
        rank_TC = scores.keep_best_groups(
            rank_TC, self.num_groups, self.groups_per_token, self.group_score
        )
        return self.choose(rank_TC, None, inputs)


def validate(fields: dict, config) -> list[tuple[str, str]]:
    """Lists what is wrong with the fields: (field, message)."""
    problems = top_k.validate(fields, config)
    problems += router.check_choice(fields, group_score=("sum_top2", "max"))
    experts, groups, kept = config.moe.num_experts, fields["num_groups"], fields["groups_per_token"]
    if groups < 1 or (experts and experts % groups):
        problems.append(("num_groups", f"must divide moe.num_experts={experts}, got {groups}"))
    elif not 1 <= kept <= groups:
        problems.append(("groups_per_token", f"must be in 1..num_groups={groups}, got {kept}"))
    elif experts and fields["k"] > kept * (experts // groups):
        room = kept * (experts // groups)
        problems.append(
            ("k", f"must be at most {room}, the experts of {kept} groups, got {fields['k']}")
        )
    if not fields["score_before_selection"]:
        problems.append(("score_before_selection", "must be true: groups are ranked by scores"))
    return problems
