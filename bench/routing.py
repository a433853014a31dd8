"""Times what routing costs in a MoE layer on CPU: scores, selection, dispatch and combine against the whole forward.

    python bench/routing.py [--json] [--repeats 21] [--kind top_k ...]

Each part is compiled and timed alone. The gather runs window by window, as in the layer's expert loop, which never
holds a sorted copy of all rows; that copy is timed too, for comparison. T=4096, D=F=256, E=64, k=8, float32. Bar: at
most 0.15 of the layer's forward for top_k. The whole layer of other routers (--kind) is timed over top_k's.

T tokens, D model width, F expert width, E experts, K experts per token, N = T*K.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moelab import environment  # noqa: E402

environment.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import pallas_kernels  # noqa: E402
from moelab import experts, routers, routing  # noqa: E402
from pallas_kernels.grouped_matmul import dispatch  # noqa: E402

T, D, F, E, K = 4096, 256, 256, 64, 8
PARTS = ("scores and selection", "dispatch: sort", "dispatch: gather", "combine")


def problem(kind):
    """A router with its parameters, its inputs, and experts."""
    fields = {"k": 1 if kind in ("base", "hash") else 2 if kind == "gshard" else K}
    if kind == "group_limited":
        fields |= {"num_groups": 8, "groups_per_token": 4}
    if kind == "hash":
        fields["token_counts"] = (1,) * 4096
    router = routers.make(kind, num_experts=E, **fields)
    index_T = jnp.arange(T, dtype=jnp.int32)
    inputs = routing.RouterInput(
        token_id_T=index_T % 4096,
        sequence_T=index_T // 256,
        position_T=index_T,
        mask_T=jnp.ones(T, bool),
        domain_T=index_T % 5,
        key=jnp.zeros(2, jnp.uint32),
    )
    x_TD = jax.random.normal(jax.random.key(0), (T, D))
    params = router.init(jax.random.key(1), x_TD, inputs, None).get("params", {})
    weights = experts.init_swiglu(jax.random.key(2), (E,), D, F, 1.0)
    return router, params, inputs, x_TD, weights


def gather_by_window(x_TD, token_N):
    """Gathers all rows, one window of the mean height at a time; the barrier makes each window exist."""
    height = T * K // E

    def body(i, last_RD):
        row_R = jax.lax.dynamic_slice(token_N, (i * height,), (height,))
        rows_RD = x_TD.at[row_R].get(mode="promise_in_bounds")
        return jax.lax.optimization_barrier((rows_RD, last_RD))[0]

    return jax.lax.fori_loop(0, E, body, jnp.zeros((height, D)))


def programs(kind):
    """name -> (compiled, arguments): the layer, and for top_k its parts."""
    router, params, inputs, x_TD, weights = problem(kind)

    def route(x_TD, params):
        return router.apply({"params": params}, x_TD, inputs, None)

    def layer(x_TD, params, weights):
        return experts.apply(weights, x_TD, route(x_TD, params), assignments_per_token=router.slots)

    found = {f"{kind} layer": (layer, (x_TD, params, weights))}
    if kind == "top_k":
        routed = jax.jit(route)(x_TD, params)

        def plan_of(routed):
            return dispatch.make_plan(routed.token_N, routed.expert_N, T, E, K)

        plan = jax.jit(plan_of)(routed)
        y_ND = jax.random.normal(jax.random.key(3), (T * K, D))
        found["scores and selection"] = (route, (x_TD, params))
        found["dispatch: sort"] = (plan_of, (routed,))
        found["dispatch: gather"] = (gather_by_window, (x_TD, plan.token_N))
        found["copy of all sorted rows"] = (dispatch.dispatch, (x_TD, plan))
        sizes_E, rows_ND = plan.group_sizes_E, x_TD[plan.token_N]
        found["experts on sorted rows"] = (
            pallas_kernels.expert_mlp,
            (rows_ND, weights["gate_up"], weights["down"], sizes_E),
        )
        found["combine"] = (
            lambda y, w, p: dispatch.combine(y, w, p, T),
            (y_ND, routed.weight_N, plan),
        )
    return {name: (jax.jit(f).lower(*a).compile(), a) for name, (f, a) in found.items()}


def measure(kinds, repeats):
    """Median seconds by name, interleaved."""
    compiled = {name: program for kind in kinds for name, program in programs(kind).items()}
    seconds = {name: [] for name in compiled}
    for repeat in range(repeats + 1):
        for name, (program, arguments) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main():
    """Prints the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--kind", action="append", choices=routers.KINDS, help="more routers")
    options = parser.parse_args()
    kinds = list(dict.fromkeys(["top_k", *(options.kind or ())]))
    median = measure(kinds, options.repeats)
    whole = median["top_k layer"]
    share = sum(median[name] for name in PARTS) / whole
    inside = 1 - median["experts on sorted rows"] / whole
    if options.json:
        print(
            json.dumps(
                {"seconds": median, "routing_share": share, "share_inside": inside}, indent=1
            )
        )
        return
    for name, value in median.items():
        print(f"{name:24s} {value * 1e3:8.2f} ms  {value / whole:6.3f} of top_k's layer")
    print(f"routing, its four parts alone           {share:.3f} of the layer's forward; bar 0.15")
    print(f"layer without its experts' own time     {inside:.3f}")


if __name__ == "__main__":
    main()
