"""Compiles a config's model for GPUs that are not here and says what memory each device needs. Shapes only.

The model has its routed experts packed in 4 bits, everything else in bfloat16, the experts split over the devices if
the config says `moe.parallel`, and runs one forward pass over a batch: router, ragged exchange, quantization of rows,
grouped kernels and combine, under jit, scan and shard_map. Nothing is computed and no weight exists.

P devices, B sequences, L tokens each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from moelab import config as config_lib
from moelab import model as model_lib
from moelab import parallel
from moelab.quant import packing, recipes
from pallas_kernels import aot, device, formats


@dataclasses.dataclass(frozen=True)
class Fit:
    """What came of compiling one model; bytes are of one device.

    Attributes:
      target, devices: the GPU, and how many.
      kernels: names of the grouped matmul kernels in the program, with how often each was compiled in.
      collectives: names of XLA's collectives in the program.
      expert_parameters: of all devices together.
      expert_bytes: of the routed experts' packed weights.
      bits: bits of a routed expert's parameter, scales included.
      rest_bytes: of the other parameters.
      argument_bytes, temp_bytes: as the compiler says.
      memory_bytes: of the GPU.
      seconds: that compiling took.
    """

    target: str
    devices: int
    kernels: dict[str, int]
    collectives: tuple[str, ...]
    expert_parameters: int
    expert_bytes: int
    bits: float
    rest_bytes: int
    argument_bytes: int
    temp_bytes: int
    memory_bytes: int
    seconds: float

    def problems(self) -> list[str]:
        """Says what is not as a packed model should be: sentences, none where all is well."""
        found = []
        wanted = self.expert_bytes + self.rest_bytes
        if self.argument_bytes > 1.01 * wanted + 2**20:
            found.append(f"arguments take {self.argument_bytes} bytes, weights are {wanted}")
        if self.bits > 4.51:
            found.append(f"a routed expert's parameter takes {self.bits:.3f} bits, more than 4.51")
        if self.argument_bytes + self.temp_bytes > self.memory_bytes:
            over = self.argument_bytes + self.temp_bytes - self.memory_bytes
            found.append(f"does not fit: {over} bytes more than the GPU's {self.memory_bytes}")
        if not self.kernels:
            found.append("no grouped matmul kernel is in the program")
        return found


_COLLECTIVES = ("ragged-all-to-all", "all-to-all", "all-gather", "all-reduce")


def compile_forward(
    config,
    target: aot.Target,
    topology: str = "1x1x1",
    *,
    tokens: int = 512,
    vocab_size: int = 32768,
    format: str = "nvfp4",
) -> Fit:
    """Compiles the forward pass of a config's model under the recipe w4a4.

    Args:
      config: a full config; its moe.num_experts is a multiple of the devices' number if moe.parallel.
      target: the GPU, from `aot.targets()`.
      topology: slices x processes x devices of a process.
      tokens: B * L / P, of one sequence on each device.
      vocab_size: V.
      format: of the experts, "nvfp4" or "mxfp4".

    Raises:
      RuntimeError: the packages of the extra `aot` are missing.
      ValueError: a config that cannot be split over so many devices.
    """
    if aot.missing():
        raise RuntimeError(aot.missing())
    found = np.array(aot.devices(target, topology))
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.Mesh(found, (parallel.DATA,), axis_types=auto)
    if config.moe.parallel and config.moe.num_experts % found.size:
        raise ValueError(
            f"moe.num_experts={config.moe.num_experts} cannot be split over {found.size} devices"
        )
    recipe = recipes.named("w4a4", format)
    model = model_lib.from_config(config, vocab_size, mesh, dtype="bfloat16", recipe=recipe)
    with device.assume(target.device):
        variables = _variables(config, model, recipe)
    inputs = _inputs(mesh, found.size, tokens)
    forward = functools.partial(_forward, model)
    compiled = aot.compile(forward, (variables, inputs), target, topology, mesh=mesh)
    experts, rest = variables["quantized"], variables["params"]
    count = sum(packed.codes.size * 2 for packed in _packed(experts))
    share = found.size if config.moe.parallel else 1
    held = sum(formats.nbytes(packed) for packed in _packed(experts)) // share
    return Fit(
        target=target.name,
        devices=found.size,
        kernels=_kernels(compiled),
        collectives=tuple(name for name in _COLLECTIVES if f" {name}" in compiled.hlo),
        expert_parameters=count,
        expert_bytes=held,
        bits=8 * held * share / max(count, 1),
        rest_bytes=sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(rest)),
        argument_bytes=compiled.memory.argument_bytes,
        temp_bytes=compiled.memory.temp_bytes,
        memory_bytes=target.memory_bytes,
        seconds=compiled.seconds,
    )


def topology_of(devices: int) -> str:
    """Returns slices x processes x devices of a process: up to 8 GPUs are one host's, more are hosts of 4."""
    if devices <= 8:
        return f"1x1x{devices}"
    if devices % 4:
        raise ValueError(f"more than 8 devices come in fours, got {devices}")
    return f"1x{devices // 4}x4"


def in_process(target: str, arguments: dict) -> Fit:
    """`compile_forward` in a process of its own, which the compiler may end.

    Args:
      target: name of the GPU.
      arguments: config (name or file), overrides (list), devices, tokens, format.
    """
    (found,) = aot.in_process(target, "moelab.fit:child", arguments)
    return Fit(**found | {"collectives": tuple(found["collectives"])})


def child(target: aot.Target, arguments: dict) -> Iterator[dict]:
    """The other end of `in_process`."""
    config = config_lib.load(arguments["config"], arguments["overrides"]).config
    options = {name: arguments[name] for name in ("tokens", "format")}
    topology = topology_of(arguments["devices"])
    yield dataclasses.asdict(compile_forward(config, target, topology, **options))


def _forward(model: model_lib.Transformer, variables: dict, inputs: model_lib.Inputs) -> jax.Array:
    hidden_BLD = model.apply(variables, inputs).hidden_BLD
    return model_lib.logits(model, variables["params"], hidden_BLD[:, -1:])


def _variables(config, model: model_lib.Transformer, recipe: recipes.Recipe) -> dict:
    """Shapes and placement of packed experts, in the layout of the assumed device, and of the rest in bfloat16."""

    def make():
        drawn = model_lib.init(model, jax.random.key(0))
        rest, quantized = packing.pack(drawn["params"], recipe)
        quantized = packing.for_device(quantized, recipe.expert_activation)
        rest = jax.tree.map(lambda a: a.astype(jnp.bfloat16), rest)
        return {"params": rest, "quantized": quantized, "router_state": drawn["router_state"]}

    shapes = jax.eval_shape(make)
    placed = parallel.placement(model.mesh, shapes, config.moe.parallel)
    return jax.tree.map(
        lambda a, to: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=to), shapes, placed
    )


def _inputs(mesh: jax.sharding.Mesh, sequences: int, length: int) -> model_lib.Inputs:
    split = parallel.batch_sharding(mesh)
    array = functools.partial(jax.ShapeDtypeStruct, (sequences, length), sharding=split)
    return model_lib.Inputs(token_BL=array(dtype=jnp.int32), mask_BL=array(dtype=jnp.bool_))


def _kernels(compiled: aot.Compiled) -> dict[str, int]:
    names = [kernel.name for kernel in compiled.kernels]
    return {name: names.count(name) for name in sorted(set(names))}


def _packed(tree) -> list[formats.BlockScaled]:
    return [a for a in jax.tree.leaves(tree, is_leaf=_is_packed) if _is_packed(a)]


def _is_packed(a) -> bool:
    return isinstance(a, formats.BlockScaled)
