"""Expert placement: which device holds which expert, and how even that makes the devices' work.

Serving with expert parallelism waits for the fullest device, so heavy experts get replicas and
devices get a mix of heavy and light ones. All here is counting on recorded loads; no jax.

M MoE layers, E computing experts, D devices, S expert slots per device, P = D * S slots of a layer
(P = E + redundant), N items to pack.

Reference: EPLB of DeepSeek (github.com/deepseek-ai/EPLB, eplb.py; read at 5791971), which serves
DeepSeek-V3 (arXiv:2412.19437). Ties go to the lowest index here, and loads are float64; EPLB sorts
float32 and leaves ties to torch. As in EPLB, two replicas of one expert may share a device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moelab import metrics, trace
from moelab.errors import UserError

Load = np.ndarray | trace.Trace


class PlacementError(UserError):
    """Experts, slots, devices and nodes that do not fit together; the message says what would."""


@dataclass(frozen=True, eq=False)
class Placement:
    """The expert in every slot.

    Attributes:
      expert_MDS: int64, expert 0..E-1 that slot s of device d holds in layer m.
      num_experts: E; in every layer each expert has one slot at least.

    Raises:
      PlacementError: an expert without slot, or an id that is none.
    """

    expert_MDS: np.ndarray
    num_experts: int

    def __post_init__(self):
        expert_MDS = np.asarray(self.expert_MDS)
        if expert_MDS.dtype.kind not in "iu" or expert_MDS.ndim != 3 or not expert_MDS.size:
            raise PlacementError(
                "wants integers (layers, devices, slots); "
                f"got {expert_MDS.dtype} of shape {expert_MDS.shape}"
            )
        if expert_MDS.min() < 0 or expert_MDS.max() >= self.num_experts:
            raise PlacementError(f"wants experts 0 to {self.num_experts - 1} in the slots")
        object.__setattr__(self, "expert_MDS", expert_MDS.astype(np.int64))
        lost = np.argwhere(self.replicas_ME == 0)
        if len(lost):
            raise PlacementError(f"expert {lost[0, 1]} has no slot in layer {lost[0, 0]}")

    @property
    def replicas_ME(self) -> np.ndarray:
        """Counts the slots of each expert: int64 (M, E)."""
        flat_MP = self.expert_MDS.reshape(len(self.expert_MDS), -1)
        return np.stack([np.bincount(e_P, minlength=self.num_experts) for e_P in flat_MP])


@dataclass(frozen=True, eq=False)
class PlacementReport:
    """Imbalance before (experts in order) and after (placed by load), float64, one per layer.

    Attributes:
      placement: what the load of the fitted documents led to.
      before_fit_M: experts in order, on the documents that the placement was fitted to.
      after_fit_M: the placement, on the same documents.
      before_held_M: experts in order, on the other documents.
      after_held_M: the placement, on the other documents: the number to believe.
      documents: how many documents were fitted to, and how many held out.
    """

    placement: Placement
    before_fit_M: np.ndarray
    after_fit_M: np.ndarray
    before_held_M: np.ndarray
    after_held_M: np.ndarray
    documents: tuple[int, int]


def expert_load(load: Load) -> np.ndarray:
    """Counts the assignments of each computing expert, or checks a given load.

    Args:
      load: a trace (columns without computation are left out), or (M, E) counts or shares.

    Returns:
      float64 (M, E).

    Raises:
      PlacementError: not (M, E), negative or not finite.
    """
    if isinstance(load, trace.Trace):
        kept = load.num_columns + 1
        counts = [np.bincount(e_TK.ravel(), minlength=kept) for e_TK in load.expert_MTK]
        return np.stack(counts)[:, : load.num_experts].astype(np.float64)
    load_ME = np.asarray(load, np.float64)
    if load_ME.ndim != 2 or not load_ME.size:
        raise PlacementError(f"load wants the shape (layers, experts); got {load_ME.shape}")
    if not np.isfinite(load_ME).all() or (load_ME < 0).any():
        raise PlacementError("load wants finite counts or shares >= 0")
    return load_ME


def replicate(load_E: np.ndarray, slots: int) -> np.ndarray:
    """Fills slots with experts: one each, then each further one for the largest load per replica.

    This greedy choice minimises max_e load_e / replicas_e.

    Args:
      load_E: (E,) loads >= 0.
      slots: P >= E.

    Returns:
      int64 (P,): 0..E-1, then the expert of each replica in the order of their making.

    Raises:
      PlacementError: fewer slots than experts.

    Reference:
      `replicate_experts` of EPLB.

    >>> replicate(np.array([9.0, 4.0, 1.0]), 5)  # 9 4 1 -> 4.5 4 1 -> 3 4 1
    array([0, 1, 2, 0, 0])
    """
    load_E = np.asarray(load_E, np.float64)
    if slots < len(load_E):
        raise PlacementError(f"{slots} slots do not hold {len(load_E)} experts")
    count_E = np.ones(len(load_E), np.int64)
    expert_P = list(range(len(load_E)))
    for _ in range(slots - len(load_E)):
        heaviest = int((load_E / count_E).argmax())
        count_E[heaviest] += 1
        expert_P.append(heaviest)
    return np.array(expert_P, np.int64)


def pack(load_N: np.ndarray, bins: int) -> np.ndarray:
    """Packs items into bins of equal number: heaviest first, to the lightest bin that has room.

    Args:
      load_N: (N,) loads >= 0.
      bins: a divisor of N.

    Returns:
      int64 (bins, N / bins): the items of each bin, as they came. With one item per bin, item i
      stays in bin i.

    Raises:
      PlacementError: N is not a multiple of bins.

    Reference:
      `balanced_packing` of EPLB.

    >>> pack(np.array([5.0, 4.0, 3.0, 2.0]), 2)  # 5 | 4, then 3 to the 4, then 2 to the 5
    array([[0, 3],
           [1, 2]])
    """
    load_N = np.asarray(load_N, np.float64)
    _divides(bins, len(load_N), "bins", "items")
    room = len(load_N) // bins
    if room == 1:
        return np.arange(bins)[:, None]  # as EPLB does: nothing moves for nothing
    items: list[list[int]] = [[] for _ in range(bins)]
    total = [0.0] * bins
    for item in np.argsort(-load_N, kind="stable"):
        lightest = min((b for b in range(bins) if len(items[b]) < room), key=total.__getitem__)
        items[lightest].append(int(item))
        total[lightest] += float(load_N[item])
    return np.array(items, np.int64)


def contiguous(layers: int, experts: int, devices: int, redundant: int = 0) -> Placement:
    """Places experts in order, replicas of experts 0, 1, ... behind them: the baseline.

    Args:
      layers: M.
      experts: E.
      devices: D, a divisor of E + redundant.
      redundant: extra slots of each layer.

    Raises:
      PlacementError: the slots do not divide.

    Reference:
      The placement that vLLM starts from (eplb_state.py,
      build_initial_global_physical_to_logical_map).
    """
    slots = _slots(experts, devices, redundant)
    expert_DS = (np.arange(slots) % experts).reshape(devices, -1)
    return Placement(np.broadcast_to(expert_DS, (layers, *expert_DS.shape)), experts)


def greedy(load: Load, devices: int, redundant: int = 0) -> Placement:
    """Replicates the heavy experts and packs all replicas onto the devices.

    Args:
      load: (M, E) counts or shares, or a trace.
      devices: D, a divisor of E + redundant.
      redundant: extra slots of each layer.

    Raises:
      PlacementError: the slots do not divide, or a bad load.

    Reference:
      The global policy of EPLB.
    """
    load_ME = expert_load(load)
    slots = _slots(load_ME.shape[1], devices, redundant)
    placed = [_placed(load_E, np.arange(len(load_E)), slots, devices) for load_E in load_ME]
    return Placement(np.stack(placed), load_ME.shape[1])


def hierarchical(
    load: Load, devices: int, *, nodes: int, groups: int, redundant: int = 0
) -> Placement:
    """Packs groups of experts onto nodes, then places each node's experts on its own devices.

    For routers that limit a token to some groups: a group stays within one node. The first
    D / nodes devices are node 0, and so on.

    Args:
      load: (M, E) counts or shares, or a trace.
      devices: D, a divisor of E + redundant and a multiple of nodes.
      nodes: a divisor of groups.
      groups: a divisor of E; group g is the experts g E / groups and following.
      redundant: extra slots of each layer, the same number in each node.

    Raises:
      PlacementError: something does not divide, or a bad load.

    Reference:
      `rebalance_experts_hierarchical` of EPLB. EPLB falls back to the global policy where groups do
      not divide by nodes; here that is an error.
    """
    load_ME = expert_load(load)
    experts = load_ME.shape[1]
    slots = _slots(experts, devices, redundant)
    _divides(groups, experts, "groups", "experts")
    _divides(nodes, groups, "nodes", "groups")
    _divides(nodes, devices, "nodes", "devices")
    placed = []
    for load_E in load_ME:
        node_groups = pack(load_E.reshape(groups, -1).sum(1), nodes)
        node_experts = np.arange(experts).reshape(groups, -1)[node_groups].reshape(nodes, -1)
        parts = [
            _placed(load_E, expert_N, slots // nodes, devices // nodes) for expert_N in node_experts
        ]
        placed.append(np.concatenate(parts))
    return Placement(np.stack(placed), experts)


def device_load(placement: Placement, load: Load) -> np.ndarray:
    """Sums the load of each device; the replicas of an expert share its load equally.

    Returns:
      float64 (M, D), in the units of the load.

    Raises:
      PlacementError: the load has other layers or experts than the placement.
    """
    load_ME = expert_load(load)
    wanted = (len(placement.expert_MDS), placement.num_experts)
    if load_ME.shape != wanted:
        raise PlacementError(
            f"load has the shape {load_ME.shape}; the placement wants {wanted} (layers, experts)"
        )
    layers, devices, _ = placement.expert_MDS.shape
    share_ME = load_ME / placement.replicas_ME
    flat_MP = placement.expert_MDS.reshape(layers, -1)
    return np.take_along_axis(share_ME, flat_MP, axis=1).reshape(layers, devices, -1).sum(-1)


def imbalance(placement: Placement, load: Load) -> np.ndarray:
    """Measures max_d load_d / mean_d load_d - 1 of each layer (MaxVio over devices).

    The load is a total: single batches vary more, so a server sees more than this.

    Returns:
      float64 (M,): 0 when even, D - 1 when one device has all, NaN without load.

    Raises:
      PlacementError: the load has other layers or experts than the placement.
    """
    return metrics.max_violation(device_load(placement, load))


def evaluate_placement(
    recorded: trace.Trace,
    devices: int,
    *,
    redundant: int = 0,
    nodes: int | None = None,
    groups: int | None = None,
    fit_share: float = 0.5,
) -> PlacementReport:
    """Fits a placement to the first documents of a trace and measures it on the others too.

    Args:
      recorded: a trace of two documents at least.
      devices: D, a divisor of E + redundant.
      redundant: extra slots of each layer; the baseline gets the same number (`contiguous`).
      nodes: with groups: `hierarchical`; without both: `greedy`.
      groups: see nodes.
      fit_share: share of the documents, in the order of the text, that the placement sees;
        rounded, and at least one document on each side.

    Raises:
      PlacementError: something does not divide, one document only, or nodes without groups.
    """
    if (nodes is None) != (groups is None):
        raise PlacementError("nodes and groups come together: give both or none")
    fit, held, documents = _halves(recorded, fit_share)
    if nodes is None or groups is None:
        placement = greedy(fit, devices, redundant)
    else:
        placement = hierarchical(fit, devices, nodes=nodes, groups=groups, redundant=redundant)
    before = contiguous(len(recorded.layers), recorded.num_experts, devices, redundant)
    return PlacementReport(
        placement=placement,
        before_fit_M=imbalance(before, fit),
        after_fit_M=imbalance(placement, fit),
        before_held_M=imbalance(before, held),
        after_held_M=imbalance(placement, held),
        documents=documents,
    )


def _halves(
    recorded: trace.Trace, fit_share: float
) -> tuple[trace.Trace, trace.Trace, tuple[int, int]]:
    """Splits by documents: what to fit to, what to hold out, and how many documents each has."""
    if not 0 < fit_share < 1:
        raise PlacementError(f"fit_share wants a number between 0 and 1; got {fit_share}")
    id_U, first_U = np.unique(recorded.document_T, return_index=True)
    if len(id_U) < 2:
        raise PlacementError("wants two documents at least: one to fit, one to hold out; got 1")
    ordered_U = id_U[np.argsort(first_U)]
    count = min(max(round(fit_share * len(id_U)), 1), len(id_U) - 1)
    fit = trace.select(recorded, documents=ordered_U[:count].tolist())
    held = trace.select(recorded, documents=ordered_U[count:].tolist())
    return fit, held, (count, len(id_U) - count)


def _placed(load_E: np.ndarray, expert_N: np.ndarray, slots: int, devices: int) -> np.ndarray:
    """Replicates and packs some of the experts: int64 (devices, slots / devices)."""
    local_P = replicate(load_E[expert_N], slots)
    count_N = np.bincount(local_P, minlength=len(expert_N))
    load_P = (load_E[expert_N] / count_N)[local_P]
    return expert_N[local_P[pack(load_P, devices)]]


def _slots(experts: int, devices: int, redundant: int) -> int:
    if devices < 1 or redundant < 0:
        raise PlacementError(f"wants devices >= 1, redundant >= 0; got {devices}, {redundant}")
    slots = experts + redundant
    over = slots % devices
    if over:
        near = [r for r in (redundant - over, redundant + devices - over) if r >= 0]
        raise PlacementError(
            f"{experts} experts and {redundant} redundant slots do not divide over {devices} "
            f"devices; the nearest redundant that does: {' or '.join(map(str, near))}"
        )
    return slots


def _divides(part: int, whole: int, parts: str, wholes: str) -> None:
    if part < 1 or whole % part:
        fit = [n for n in range(1, whole + 1) if whole % n == 0]
        raise PlacementError(
            f"{whole} {wholes} do not divide into {part} {parts}; wants one of {fit}"
        )
