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
    assert all(
        not np.any(leaf) for leaf in jax.tree.leaves(distances)
    )  # and a new window begins from nothing


def test_distances_are_those_of_the_window():
    steps = [row(1.24 + 0.02 * (i % 2)) for i in range(4)]
    distances, weights, counts = run(RESET, steps, first=3)
    np.testing.assert_allclose(distances.weight["w"][0, 1], 0.06, rtol=1e-5)
    np.testing.assert_allclose(distances.rounded["w"][0, 1], 1.5, rtol=1e-6)
    np.testing.assert_array_equal(weights, steps[-1])
    assert counts == [0, 0, 0]


@pytest.mark.parametrize(
    ("ratio", "reset"), [(24.0, True), (26.0, False)]
)  # the ratio is 25, but for float32's rounding
def test_the_ratio_is_the_threshold(ratio, reset):
    watch = oscillation.Reset(every=10, start=2, window=4, ratio=ratio, format="mxfp4")
    steps = [row(1.24 + 0.02 * (i % 2)) for i in range(5)]
    assert run(watch, steps, first=3)[2][-1] == reset


def test_windows_begin_after_start_and_repeat():
    # Every step flips. start 2, window 4, every 10: windows are steps 3-6, 13-16, 23-26.
    steps = [row(1.24 + 0.02 * (i % 2)) for i in range(28)]
    _, _, counts = run(RESET, steps)
    assert [i + 1 for i, count in enumerate(counts) if count] == [6, 16, 26]


def test_outside_of_a_window_nothing_moves():
    zero = RESET.init({"w": row(1.0)})
    for step in (1, 2, 7, 12):
        distances, weights, count = RESET.update(
            zero, {"w": row(1.24)}, {"w": row(1.26)}, jnp.int32(step)
        )
        assert count == 0 and not np.any(distances.rounded["w"])
        np.testing.assert_array_equal(weights["w"], row(1.26))


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
        (dict(window=0), "window must be from 1 to every=10, got 0"),
        (dict(window=11), "window must be from 1 to every=10, got 11"),
        (dict(start=-1), "start must be at least 0"),
        (dict(ratio=0.0), "ratio must be greater than 0"),
        (dict(format="fp5"), "unknown format 'fp5'; allowed: nvfp4"),
    ],
)
def test_errors(fields, message):
    good = dict(every=10, start=2, window=4, ratio=8.0, format="mxfp4")
    with pytest.raises(ValueError, match=message):
        oscillation.Reset(**good | fields)
