"""The device mesh and how a batch lies on it.

One axis, `data`: tokens are split over it; weights are the same everywhere, but for those of experts where a config
says `moe.parallel`: each device has its share of every layer's. Routing, dispatch and experts run inside
`shard_map`, so what they see is local and every collective is explicit.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import NamedSharding, PartitionSpec

DATA = "data"


def make_mesh(num_devices: int | None = None) -> jax.sharding.Mesh:
    """Returns a mesh over the first devices (all of them by default), with the axis `data`."""
    devices = jax.devices()
    if num_devices is not None:
        if not 1 <= num_devices <= len(devices):
            raise ValueError(f"num_devices must be 1..{len(devices)}, got {num_devices}")
        devices = devices[:num_devices]
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((len(devices),), (DATA,), axis_types=auto, devices=devices)


def abstract_mesh() -> jax.sharding.AbstractMesh:
    """Returns a mesh of one device that need not exist, for shapes without a device."""
    return jax.sharding.AbstractMesh((1,), (DATA,), axis_types=(jax.sharding.AxisType.Auto,))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """How arrays with a leading batch or token axis lie on the mesh."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """How weights and states lie on the mesh: the same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def placement(mesh: jax.sharding.Mesh, tree, split_experts: bool):
    """How the leaves of a state lie on the mesh: replicated, but for the experts' weights if they are split.

    Args:
      mesh: from `make_mesh`.
      tree: parameters, packed weights, or any state with leaves shaped and named like them (an optimizer's moments).
      split_experts: over the axis of experts, which follows that of the repetitions of a scan.

    Returns:
      A tree of NamedSharding.
    """

    def of(path, leaf) -> NamedSharding:
        is_expert = any(getattr(key, "key", None) == "experts" for key in path)
        split = split_experts and is_expert and leaf.ndim > 1
        return NamedSharding(mesh, PartitionSpec(None, DATA) if split else PartitionSpec())

    return jax.tree_util.tree_map_with_path(of, tree)


def shard_tokens(
    function: Callable, mesh: jax.sharding.Mesh, token_arguments: tuple[bool, ...]
) -> Callable:
    """Runs `function` once per device on its tokens.

    Args:
      function: takes pytrees; returns pytrees whose arrays all have a leading token axis.
      mesh: from `make_mesh`.
      token_arguments: for each argument whether its arrays have a leading token axis; scalars in them, and all
        arrays of the other arguments, are the same on every device.

    Returns:
      The function of global arrays. Gradients of the shared arguments are summed over the devices.
    """

    def specs(argument, of_tokens: bool):
        return jax.tree.map(
            lambda a: PartitionSpec(DATA) if of_tokens and jax.numpy.ndim(a) else PartitionSpec(),
            argument,
        )

    def sharded(*arguments):
        in_specs = tuple(map(specs, arguments, token_arguments))
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(DATA)
        )
        return mapped(*arguments)

    return sharded


def vary_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Marks x as differing between devices wherever `like` does; needed for loop carries inside shard_map."""
    missing = _varying(like) - _varying(x)
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x


def _varying(x: jax.Array) -> frozenset:
    """The mesh axes over which x differs between devices."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)
