"""Oscillating weights: who flips, when a window runs, and who is reset."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moelab.quant import oscillation
from pallas_kernels import formats

RESET = oscillation.Reset(every=10, start=2, window=4, ratio=8.0, format="mxfp4")


def row(*values):
    """A (1, 32) matrix whose block has the scale 1: its largest value is 6."""
    return jnp.zeros((1, 32)).at[0, 0].set(6.0).at[0, 1 : 1 + len(values)].set(jnp.array(values))


def run(reset, weights, first=1):
    """Feeds a list of weights as consecutive steps; returns distances, weights, count of the last step, all counts."""
    distances, counts, update = reset.init({"w": weights[0]}), [], jax.jit(reset.update)
    for i, (old, new) in enumerate(zip(weights[:-1], weights[1:], strict=True)):
        step = jnp.int32(first + i)
        distances, kept, count = update(distances, {"w": old}, {"w": new}, step)
        counts.append(int(count))
    return distances, kept["w"], counts


def test_a_weight_that_oscillates_is_reset_and_one_that_drifts_is_not():
    # Codes are ..., 1, 1.5, 2, ...: the threshold between 1 and 1.5 is 1.25. The first weight goes 1.24, 1.26, 1.24,
    # 1.26, 1.24: path 4 * .02 = .08, rounded path 4 * .5 = 2, 25 times as much. The second drifts from 1.0 to 1.4
    # in steps of .1: path .4, rounded path .5 (once over 1.25), 1.25 times. The third rests.
    steps = [row(1.24 + 0.02 * (i % 2), 1.0 + 0.1 * i, 2.0) for i in range(5)]
    distances, weights, counts = run(RESET, steps, first=3)
    assert counts == [0, 0, 0, 1]  # the window is steps 3 to 6
    np.testing.assert_allclose(weights[0, :4], [6, 1.0, 1.4, 2.0], rtol=1e-6)  # 1.24 rounds to 1
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(distances))


def test_distances_are_those_of_the_window():
    steps = [row(1.24 + 0.02 * (i % 2)) for i in range(4)]
    distances, weights, counts = run(RESET, steps, first=3)
    np.testing.assert_allclose(distances.weight["w"][0, 1], 0.06, rtol=1e-5)
    np.testing.assert_allclose(distances.rounded["w"][0, 1], 1.5, rtol=1e-6)
    np.testing.assert_array_equal(weights, steps[-1])
    assert counts == [0, 0, 0]


@pytest.mark.parametrize(("ratio", "reset"), [(8.0, 1), (np.nextafter(np.float32(8), 9), 0)])
def test_the_ratio_is_the_threshold(ratio, reset):
    # 1.25 -+ 1/32, four times: path 4 / 16, rounded path 4 / 2, all exact: a ratio of 8.
    watch = oscillation.Reset(every=10, start=2, window=4, ratio=float(ratio), format="mxfp4")
    steps = [row(1.25 - 1 / 32 + (i % 2) / 16) for i in range(5)]
    assert run(watch, steps, first=3)[2] == [0, 0, 0, reset]


def test_a_weight_that_never_moved_stays():
    # Its block's largest value goes from 6 to 7 and back: the scale from 1 to 2 and back, so 1.5 is rounded to 1.5 and
    # to 2 (0.75 * 2 is a tie of 1 and 2 in codes 0.5 and 1: to the even one). Path 0, rounded path 2: no ratio.
    steps = [row(1.5).at[0, 0].set(6.0 + i % 2) for i in range(5)]
    _, weights, counts = run(RESET, steps, first=3)
    assert counts == [0, 0, 0, 0]
    np.testing.assert_array_equal(weights, steps[-1])


def test_the_rule_counts():
    # The largest value is 7. floor: scale 1, and 1.25 is a threshold. rceil: scale 2, and from 0.5 to 1.5 all is 1.
    steps = [row(1.25 - 1 / 32 + (i % 2) / 16).at[0, 0].set(7.0) for i in range(2)]
    for rule, hit in ((None, 0), ("rceil", 0), ("floor", 1)):
        fields = dict(every=1, start=0, window=1, ratio=8.0, format="mxfp4", rule=rule)
        assert run(oscillation.Reset(**fields), steps)[2] == [hit]
        assert float(oscillation.flip_rate(*steps, "mxfp4", rule)) == hit / 32


@pytest.mark.parametrize(
    ("every", "start", "window", "ends"),
    [(10, 2, 4, [6, 16, 26]), (8, 19, 3, [22]), (4, 18, 4, [22, 26]), (1, 24, 1, [25, 26, 27])],
)
def test_windows_begin_after_start_and_repeat(every, start, window, ends):
    # Every step flips. every 10, start 2, window 4: windows are steps 3-6, 13-16, 23-26.
    watch = oscillation.Reset(every=every, start=start, window=window, ratio=8.0, format="mxfp4")
    steps = [row(1.24 + 0.02 * (i % 2)) for i in range(28)]
    _, _, counts = run(watch, steps)
    assert [i + 1 for i, count in enumerate(counts) if count] == ends


def test_outside_of_a_window_nothing_moves():
    some = jax.tree.map(lambda d: d + 9.0, RESET.init({"w": row(1.0)}))
    update = jax.jit(RESET.update)
    for step in (1, 2, 7, 12, 17):
        distances, weights, count = update(
            some, {"w": row(1.24)}, {"w": row(1.26)}, jnp.int32(step)
        )
        assert count == 0
        np.testing.assert_array_equal(weights["w"], row(1.26))
        for leaf in jax.tree.leaves(distances):
            np.testing.assert_array_equal(leaf, np.full((1, 32), 9.0))


def test_a_window_forgets_one_whose_end_was_skipped():
    # Steps 3 to 5, and 6 is skipped: its distances are not kept. Then step 13.
    steps = [row(1.24 + 0.02 * (i % 2)) for i in range(4)]
    distances, _, _ = run(RESET, steps, first=3)
    old, new = {"w": row(1.0)}, {"w": row(1.5)}
    distances, _, count = RESET.update(distances, old, new, jnp.int32(13))
    assert count == 0
    for path in distances:
        np.testing.assert_array_equal(path["w"], np.abs(new["w"] - old["w"]))


def test_in_a_scan_over_steps():
    """As in training: the step is a traced number, and the weights that were reset go on."""
    push = jnp.where(jnp.arange(30) % 2 == 0, 0.02, -0.02)

    def one(carry, at):
        distances, weights = carry
        step, push = at
        new = {"w": weights["w"].at[0, 1].add(push)}
        distances, new, count = RESET.update(distances, weights, new, step)
        return (distances, new), count

    start = {"w": row(1.24)}
    steps = jnp.arange(1, 31, dtype=jnp.int32)
    (_, weights), counts = jax.jit(
        lambda: jax.lax.scan(one, (RESET.init(start), start), (steps, push))
    )()
    # Reset after step 6 to 1; from there 1.02 and 1.0 are far from 1.25, and no later window finds anything.
    np.testing.assert_array_equal(np.flatnonzero(counts), [5])
    np.testing.assert_allclose(weights["w"][0, 1], 1.0, rtol=1e-6)


def test_nonfinite_blocks_are_left_alone():
    steps = [row(1.24 + 0.02 * (i % 2), jnp.nan) for i in range(5)]
    _, weights, counts = run(RESET, steps, first=3)
    assert counts[-1] == 0
    np.testing.assert_array_equal(weights, steps[-1])


def test_matrices_of_stacked_layers_are_apart():
    old, new = (jax.random.normal(jax.random.key(i), (2, 3, 32, 64)) for i in range(2))
    watch = oscillation.Reset(every=1, start=0, window=1, ratio=0.5, format="nvfp4")
    _, all_weights, total = watch.update(
        watch.init({"w": old}), {"w": old}, {"w": new}, jnp.int32(1)
    )
    count = 0
    for i in range(2):
        for e in range(3):
            one = watch.init({"w": old[i, e]})
            _, weights, hit = watch.update(one, {"w": old[i, e]}, {"w": new[i, e]}, jnp.int32(1))
            np.testing.assert_array_equal(weights["w"], all_weights["w"][i, e])
            count += int(hit)
    assert count == total > 0


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("format", ["nvfp4", "nvfp4_2d", "mxfp4", "int4_group", "fp8_channel"])
def test_what_is_not_finite_stays_in_its_block(format, bad):
    old, new = (0.1 * jax.random.normal(jax.random.key(i), (32, 64)) + 1.0 for i in range(2))
    # The largest is elsewhere: NVFP4's global scale is the same. Rows 0 to 15 share tiles with the bad one.
    old, new = (w.at[20, 40].set(4.0) for w in (old, new))
    watch = oscillation.Reset(every=1, start=0, window=1, ratio=1.5, format=format)
    update = jax.jit(lambda new: watch.update(watch.init(old), old, new, jnp.int32(1)))
    broken = new.at[3, 5].set(bad)
    _, weights, count = update(broken)
    np.testing.assert_array_equal(np.isfinite(weights), np.isfinite(broken))
    np.testing.assert_array_equal(weights[3, :16], broken[3, :16])  # nobody is reset in its block
    np.testing.assert_array_equal(weights[16:], update(new)[1][16:])
    assert 0 < np.sum(np.isfinite(broken) & (weights != broken)) <= count


def test_a_weight_that_would_become_infinite_stays():
    # MXFP4 rounds the scale up: 2^128 / 4 * 4 for 3.3e38. Its rounded path is infinite, 8 times its path too.
    huge = row(3.3e38)
    assert np.isinf(formats.dequantize(formats.quantize(huge, "mxfp4"))[0, 1])
    watch = oscillation.Reset(every=1, start=0, window=1, ratio=8.0, format="mxfp4")
    _, weights, count = watch.update(watch.init(huge), row(0.0), huge, jnp.int32(1))
    assert count == 0
    np.testing.assert_array_equal(weights, huge)


def test_bfloat16_weights_stay_bfloat16():
    steps = [row(1.25 - 1 / 32 + (i % 2) / 16).astype(jnp.bfloat16) for i in range(5)]
    distances, weights, counts = run(RESET, steps, first=3)
    assert counts[-1] == 1 and weights.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(distances))
    np.testing.assert_array_equal(weights, row(1.0).astype(jnp.bfloat16))


def test_paths_and_reset_against_numpy():
    """Many random weights, two leaves: paths of float64 sums of what formats rounds to, and who is over the ratio."""
    watch = oscillation.Reset(every=9, start=1, window=5, ratio=2.0, format="nvfp4")
    keys = jax.random.split(jax.random.key(0), 7)
    start = {"a": jax.random.normal(keys[6], (2, 16, 64)), "b": jax.random.normal(keys[5], (8, 32))}
    seen = [start]
    for key in keys[:5]:
        noise = lambda w, key=key: w + 0.02 * jax.random.normal(key, w.shape)  # noqa: E731
        seen.append(jax.tree.map(noise, seen[-1]))
    distances, update = watch.init(start), jax.jit(watch.update)
    for i in range(5):
        distances, weights, count = update(distances, seen[i], seen[i + 1], jnp.int32(2 + i))
    total = 0
    for name in start:
        w = [np.asarray(tree[name], np.float64) for tree in seen]
        q = [
            np.asarray(formats.dequantize(formats.quantize(tree[name], "nvfp4")), np.float64)
            for tree in seen
        ]
        path, rounded = (sum(abs(np.diff(np.stack(a), axis=0))) for a in (w, q))
        sure = abs(rounded / path / 2 - 1) > 1e-4  # of which side of the ratio it is on
        want = np.where(rounded >= 2 * path, q[-1], w[-1])
        assert sure.mean() > 0.99 and 0 < np.mean(rounded >= 2 * path) < 1
        np.testing.assert_array_equal(weights[name][sure], want[sure])
        total += np.sum(rounded >= 2 * path)
    assert abs(int(count) - total) <= 2


def test_flip_rate_by_hand():
    # 1.24 -> 1.26 flips (1 to 1.5), 1.0 -> 1.2 does not, 0.1 -> -0.1 goes from 0 to -0: no flip. 1 of 32.
    old, new = row(1.24, 1.0, 0.1), row(1.26, 1.2, -0.1)
    assert float(oscillation.flip_rate({"w": old}, {"w": new}, "mxfp4")) == 1 / 32
    two = oscillation.flip_rate([old, old], [new, old], "mxfp4")
    assert float(two) == 1 / 64
    assert float(oscillation.flip_rate({}, {}, "mxfp4")) == 0


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "mxfp8_e4m3", "int4_group", "int8_channel"])
def test_flip_rate_counts_codes(format):
    old = jax.random.normal(jax.random.key(0), (3, 32, 64))
    new = old + 0.03 * jax.random.normal(jax.random.key(1), old.shape)
    q = [formats.quantize(w, format, num_batch_axes=1) for w in (old, new)]
    codes = [np.asarray(a.codes) for a in q]
    if formats.FORMATS[format].element.bits == 4:
        codes = [np.stack([c & 15, c >> 4]) for c in codes]
    if format == "mxfp8_e4m3":
        codes = [np.where(c == 128, 0, c) for c in codes]
    elif format in ("nvfp4", "mxfp4"):
        codes = [np.where(c == 8, 0, c) for c in codes]
    want = np.mean(codes[0] != codes[1])
    got = oscillation.flip_rate(old, new, format)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert 0 < want < 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(every=0), "every must be at least 1, got 0"),
        (dict(window=0), "window must be from 1 to every=10, got 0"),
        (dict(window=11), "window must be from 1 to every=10, got 11"),
        (dict(start=-1), "start must be at least 0"),
        (dict(ratio=0.0), "ratio must be greater than 0, got 0.0"),
        (dict(ratio=float("nan")), "ratio must be greater than 0, got nan"),
        (dict(rule="mse"), "unknown rule 'mse' for format mxfp4; allowed: rceil, floor"),
        (dict(format="fp5"), "unknown format 'fp5'; allowed: nvfp4"),
    ],
)
def test_errors(fields, message):
    good = dict(every=10, start=2, window=4, ratio=8.0, format="mxfp4")
    with pytest.raises(ValueError, match=message):
        oscillation.Reset(**good | fields)
