"""The audit: which rows of a table of measured times cannot be, by physics, and what looks so and is not.

Tables are Parquet, CSV or JSON, with the columns of the wheel's kernel tables (experts, matrix products, exchange) or
of serving rows (model, gpu, precision, tp, dp, ep, batch, isl, osl, tpot_ms).
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from moelab.errors import UserError
from moelab.plan import hardware, measured, physics, readers, recipes, roofline, serving
from moelab.plan.hardware import Gpu
from moelab.plan.work import Layout

KINDS = {
    "experts": ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_dtype"),
    "product": ("gemm_dtype", "m", "n", "k"),
    "exchange": ("comm_dtype", "ep_size", "node_num", "hidden_size", "num_tokens", "phase"),
    "serving": ("model", "gpu", "precision", "tp", "batch", "isl", "osl", "tpot_ms"),
}
_TIMES = {"experts": "latency", "product": "latency", "exchange": "latency", "serving": "tpot_ms"}
_DTYPES = {
    "experts": "moe_dtype",
    "product": "gemm_dtype",
    "exchange": "comm_dtype",
    "serving": "precision",
}
_WORDS = ("model", "gpu", "phase", *_DTYPES.values())
_SIZES = ("dp", "ep", "moe_tp_size", "moe_ep_size")  # 1 where they are not there
_DEVICES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA B300 SXM6 AC": "b300",
    "NVIDIA GB200": "gb200",
    "NVIDIA GB300": "gb300",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "rtx_pro_6000",
}


@dataclasses.dataclass(frozen=True)
class Impossible:
    """A row that is faster than physics.

    Attributes:
      table, row: where it is: file and number from 0.
      gpu, kernel, dtype: of the row.
      shape: what was measured, in words.
      seconds, least: measured and least possible.
      reason: "bytes", "FLOPs" or "link".
    """

    table: str
    row: int
    gpu: str
    kernel: str
    dtype: str
    shape: str
    seconds: float
    least: float
    reason: str

    @property
    def factor(self) -> float:
        """How many times faster than possible."""
        return self.least / self.seconds


@dataclasses.dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
      checked: (gpu, kind, kernel) -> rows that were judged.
      skipped: why rows were not judged -> how many.
      impossible: the rows that cannot be.
      explained: false positive -> rows that only its rule makes possible.
    """

    checked: Mapping[tuple[str, str, str], int]
    skipped: Mapping[str, int]
    impossible: tuple[Impossible, ...]
    explained: Mapping[str, int]


def wheel_tables(gpus: tuple[str, ...] = ()) -> Iterator[Path]:
    """Lists the wheel's tables of expert layers, matrix products and exchanges."""
    folder = measured.need() / "systems" / "data"
    wanted = {f"{name}_sxm" if name[0] in "ahb" else name for name in gpus}
    wanted |= {"rtx_pro_6000_server"} if "rtx_pro_6000" in gpus else set()
    for path in sorted(folder.rglob("*.parquet")):
        system, kind = path.relative_to(folder).parts[:2]
        known = system.removesuffix("_sxm").removesuffix("_server") in hardware.GPUS
        named = path.name in ("moe_perf.parquet", "gemm_perf.parquet", "moe_a2a_perf.parquet")
        if known and named and (not wanted or system in wanted):
            yield path


def run(paths: Iterator[Path] | list[Path], root: Path | None = None) -> Audit:
    """Audits tables.

    Raises:
      UserError: a file that is none of these tables.
    """
    checked, skipped, explained = (collections.Counter() for _ in range(3))
    impossible: list[Impossible] = []
    for path in paths:
        name = str(path.relative_to(root)) if root else path.name
        columns = read(path)
        kind = kind_of(columns, name)
        _judge(name, kind, columns, (checked, skipped, explained, impossible))
    impossible.sort(key=lambda row: -row.factor)
    return Audit(dict(checked), dict(skipped), tuple(impossible), dict(explained))


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads a table as columns.

    Raises:
      UserError: no such file, or no table.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path)
            return {n: table[n].to_numpy(zero_copy_only=False) for n in table.column_names}
        text = path.read_text(encoding="utf-8")
        rows = (
            json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
        )
        if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
            raise ValueError("wants a list of rows, one at least")
        return {n: np.array([_value(row.get(n)) for row in rows], object) for n in rows[0]}
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is no table of measured times: {reason[:200]}") from None


def _value(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def kind_of(columns: Mapping[str, np.ndarray], name: str) -> str:
    """Tells by its columns what a table measures.

    Raises:
      UserError: nothing that is known here.
    """
    for kind, wanted in KINDS.items():
        if set(wanted) <= set(columns) and _TIMES[kind] in columns:
            return kind
    wanted = "; ".join(f"{k}: {', '.join((*v, _TIMES[k]))}" for k, v in KINDS.items())
    raise UserError(f"{name}: its columns are those of no table known here ({wanted})")


def _judge(name: str, kind: str, columns, into) -> None:
    """Judges one table, one GPU, kernel and dtype at a time."""
    checked, skipped, explained, impossible = into
    count = len(columns[_TIMES[kind]])
    device = (
        columns["gpu" if kind == "serving" else "device"] if _has_device(columns, kind) else None
    )
    dtypes = columns[_DTYPES[kind]]
    kernels = columns.get("kernel_source", np.full(count, "-", object))
    groups = collections.defaultdict(list)
    for i in np.flatnonzero(_judgeable(kind, columns, skipped)).tolist():
        groups[str(device[i]), str(kernels[i]), str(dtypes[i])].append(i)
    for (device_name, kernel, dtype), members in groups.items():
        index = np.array(members)
        gpu, why = _gpu(device_name, dtype, kind)
        if gpu is None:
            skipped[why] += len(index)
            continue
        rows = {n: c[index] for n, c in columns.items()}
        least, reason, excuses = _BOUNDS[kind](gpu, kernel, dtype, rows)
        checked[gpu.name, kind, kernel] += len(index)
        seconds = np.asarray(rows[_TIMES[kind]], float) / 1e3
        limit = seconds * (1 + physics.TOLERANCE)
        for excuse, without in excuses.items():
            explained[excuse] += int(((without > limit) & (least <= limit)).sum())
        for i in np.flatnonzero(least > limit):
            shape = _words(kind, {n: c[i] for n, c in rows.items()})
            found = (shape, float(seconds[i]), float(least[i]), str(reason[i]))
            impossible.append(Impossible(name, int(index[i]), gpu.name, kernel, dtype, *found))


def _judgeable(kind: str, columns, skipped) -> np.ndarray:
    """Marks the rows whose sizes, time and model are there; counts why others are not judged."""
    names = [n for n in (*KINDS[kind], *_SIZES, _TIMES[kind]) if n in columns and n not in _WORDS]
    good = np.logical_and.reduce([_above_zero(columns[n], n in _SIZES) for n in names])
    if not good.all():
        skipped["a size or a time that is no number above 0"] += int((~good).sum())
    if kind == "serving":
        for name in sorted({str(m) for m in columns["model"][good]}):
            try:
                readers.model(name)
            except UserError:
                unknown = good & np.array([str(m) == name for m in columns["model"]])
                skipped[f"unknown model {name!r}"] += int(unknown.sum())
                good &= ~unknown
    return good


def _above_zero(values: np.ndarray, may_be_empty: bool) -> np.ndarray:
    """Marks finite numbers above 0."""
    try:
        numbers = np.asarray(values, float)
    except (TypeError, ValueError):
        empty = 1.0 if may_be_empty else np.nan
        values = [empty if x in ("", None) else _value(x) for x in values]
        numbers = np.array([x if isinstance(x, float | int) else np.nan for x in values], float)
    return np.isfinite(numbers) & (numbers > 0)


def _has_device(columns, kind: str) -> bool:
    wanted = "gpu" if kind == "serving" else "device"
    if wanted not in columns:
        raise UserError(f"the table wants a column {wanted!r}: which GPU a row was measured on")
    return True


def _gpu(device: str, dtype: str, kind: str) -> tuple[Gpu | None, str]:
    """Finds the GPU, or says why a row cannot be judged."""
    name = _DEVICES.get(device, device)
    try:
        gpu = hardware.find(name)
    except hardware.HardwareError:
        return None, f"unknown GPU {device!r}"
    if kind == "serving":
        try:
            lacking = [p for p in recipes.named(dtype).precisions() if p not in gpu.peaks]
        except UserError:
            return None, f"unknown precision {dtype!r}"
        return (None, f"{dtype} on {gpu.name}, which has no {lacking[0]}") if lacking else (gpu, "")
    if kind == "exchange":
        return gpu, ""
    if dtype not in physics.DTYPES:
        return None, f"unknown dtype {dtype!r}"
    if physics.DTYPES[dtype][1] not in gpu.peaks:
        return None, f"{dtype} on {gpu.name}, which has no such tensor cores"
    return gpu, ""


def _nongated(kernel: str, rows) -> np.ndarray:
    """Marks experts of two matrices: by the kernel's name, and Nemotron's (22 of 512 experts, or 6 of 128)."""
    by_name = np.full(len(rows["topk"]), "nongated" in kernel)
    topk, count = np.asarray(rows["topk"], float), np.asarray(rows["num_experts"], float)
    return by_name | ((topk == 22) & (count == 512)) | ((topk == 6) & (count == 128))


def _experts(gpu: Gpu, kernel: str, dtype: str, rows):
    shape = {n: np.asarray(rows[n], float) for n in KINDS["experts"][:5]}
    ones = np.ones_like(shape["topk"])
    shape |= {n: np.asarray(rows.get(n, ones), float) for n in ("moe_tp_size", "moe_ep_size")}
    balanced = np.array([str(d) == "balanced" for d in rows.get("distribution", ones)])
    grouped = (shape["num_experts"] == 256) & (shape["topk"] == 8) & (shape["hidden_size"] == 7168)
    two = _nongated(kernel, rows)
    touchable = np.where(grouped, 0.5, 1.0)

    def least(touch, matrices):
        return physics.experts(gpu, dtype, shape | {"touchable": touch}, balanced, matrices)

    found = least(touchable, np.where(two, 2, 3))
    excuses = {
        "non-gated experts": least(touchable, 3 * ones).seconds,
        "group-limited routing": least(ones, np.where(two, 2, 3)).seconds,
    }
    return found.seconds, found.reason, excuses


def _product(gpu: Gpu, kernel: str, dtype: str, rows):
    found = physics.product(gpu, dtype, rows["m"], rows["n"], rows["k"])
    return found.seconds, found.reason, {}


def _exchange(gpu: Gpu, kernel: str, dtype: str, rows):
    size = 2 if dtype in ("bfloat16", "float16", "half") else 0.5 if "fp4" in dtype else 1
    names = ("num_tokens", "hidden_size", "ep_size", "node_num")
    least = physics.exchange(gpu, *(rows[n] for n in names), size)
    return least, np.full(len(least), "link"), {}


def _serving(gpu: Gpu, kernel: str, dtype: str, rows):
    """Bounds a decoding step by the weights that one token needs: whatever the routing, these are read."""
    recipe = recipes.named(dtype)
    least = []
    for i in range(len(rows["model"])):
        model = readers.model(str(rows["model"][i]))
        size = lambda n, i=i: float(rows[n][i] or 1) if n in rows else 1.0  # noqa: E731
        layout = Layout(size("tp"), size("dp"), 1)  # the mean over ranks, not the fullest
        prepared = serving.prepare(
            *(model, recipe, gpu, layout, 1 / layout.dp, size("isl"), size("osl")),
            serving.Load(0, 0, disaggregated=True),
        )
        least.append(serving.tpot(prepared, roofline.PEAK)[0])
    return np.array(least), np.full(len(least), "bytes"), {}


_BOUNDS = {
    "experts": _experts,
    "product": _product,
    "exchange": _exchange,
    "serving": _serving,
}


def _words(kind: str, row: Mapping) -> str:
    names = {
        "experts": (*KINDS["experts"][:5], "moe_tp_size", "moe_ep_size", "distribution"),
        "product": ("m", "n", "k"),
        "exchange": ("num_tokens", "hidden_size", "ep_size", "node_num", "phase"),
        "serving": ("model", "tp", "dp", "ep", "batch", "isl", "osl"),
    }[kind]
    return " ".join(
        f"{n}={row[n]:g}" if _number(row[n]) else f"{n}={row[n]}" for n in names if n in row
    )


def _number(value) -> bool:
    return isinstance(value, int | float | np.integer | np.floating)


def of_gpus(found: Audit, gpus: tuple[str, ...]) -> Audit:
    """Returns what was found of some GPUs; what was explained or not judged stays that of the tables."""
    return dataclasses.replace(
        found,
        checked={key: count for key, count in found.checked.items() if key[0] in gpus},
        impossible=tuple(row for row in found.impossible if row.gpu in gpus),
    )


def by_gpu(found: Audit) -> list[tuple]:
    """Lists per GPU: rows judged, impossible rows, their kernels, the largest factor."""
    judged, rows = collections.Counter(), collections.defaultdict(list)
    for (gpu, _, _), count in found.checked.items():
        judged[gpu] += count
    for row in found.impossible:
        rows[row.gpu].append(row)
    return [
        (
            gpu,
            count,
            len(rows[gpu]),
            ", ".join(sorted({f"{r.kernel} {r.dtype}" for r in rows[gpu]})) or "-",
            f"{rows[gpu][0].factor:.2f}x" if rows[gpu] else "-",
        )
        for gpu, count in sorted(judged.items())
    ]
