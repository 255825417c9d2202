"""The least time a round of draft, verify, accept and commit can take, from bytes, FLOPs and collectives alone.

Three roofs: HBM bytes of the device that reads most, bfloat16 FLOPs of the device that computes most, and bytes that a
device sends. Each is a bound by itself; the floor is the highest, as if the others hid behind it entirely. Launches,
latencies, sampling and everything that is less than perfect come on top.

Rows meet their experts by a sum over all devices that hold any or, where these hold different ones, by an exchange.
Listed is the way that the program goes (`expert_dispatch`); the floor is that of the way that sends for less time.

Experts are chosen as if evenly and independently; rows that share experts read less than this floor. Every layer waits
for its slowest device, so where devices hold whole experts, the expectation is that of the one with most to do.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from mimo_jax.config import AttentionConfig
from mimo_jax.devices import Device
from mimo_jax.expert_dispatch import Message, chosen_way, messages
from mimo_jax.plan import ACTIVATION_BYTES, SUM_BYTES, Plan, Weight
from sharding.topology import Topology

LATENCY = 10e-6
"""Seconds to start a collective, an estimate; no floor has it."""
_PICK_BYTES = 8  # a largest logit and its index


def expected_distinct(experts: int, top_k: int, tokens: int) -> float:
    """Experts of a layer that `tokens` tokens reach, each choosing `top_k` evenly."""
    return experts * _chance(experts, top_k, tokens)


def _chance(experts: int, top_k: int, tokens: int) -> float:
    """That some token reaches a given expert."""
    return 1 - (1 - top_k / experts) ** tokens


@cache
def expected_largest(parts: int, trials: int, chance: float) -> float:
    """Expectation of the largest of `parts` independent binomial counts of `trials` trials each."""
    if parts == 1 or chance in (0, 1):
        return trials * chance
    j = np.arange(1, trials + 1)
    log_ratio = np.log((trials - j + 1) / j) + math.log(chance) - math.log1p(-chance)
    log_mass = trials * math.log1p(-chance) + np.concatenate([[0.0], np.cumsum(log_ratio)])
    at_most = np.minimum(np.cumsum(np.exp(log_mass)), 1.0)
    return float(np.sum(1 - at_most[:-1] ** parts))


@dataclass(frozen=True)
class Collective:
    """Alike collectives of a round."""

    what: str
    kind: str
    axis: str
    """Of the mesh, or all of them."""
    devices: int
    count: int
    """In a round."""
    payload_bytes: int
    """Of the whole array that is reduced or gathered; of one device's parts that are exchanged, its own included."""
    sent_bytes: float
    """By one device, each time: the least without reduction inside the network."""
    seconds: float
    """All of them, at the speed of the links."""


@dataclass(frozen=True)
class Floor:
    """What a round costs at least."""

    experts_reached: float
    """Distinct experts of a layer that the batch's rows are expected to reach."""
    experts_of_slowest: float
    """Of these, those of the device (or devices that slice the same experts) that has most."""
    bytes_read: dict[str, float]
    """By one device."""
    flops: dict[str, float]
    """By one device."""
    collectives: tuple[Collective, ...]
    interconnect_seconds: float
    """To send what a round sends."""
    device: Device

    @property
    def bandwidth_seconds(self) -> float:
        """To read what a round reads."""
        return sum(self.bytes_read.values()) / self.device.hbm_bytes_per_s

    @property
    def flops_seconds(self) -> float:
        """To compute what a round computes."""
        return sum(self.flops.values()) / self.device.bf16_flops

    @property
    def seconds(self) -> float:
        """The highest of the three."""
        return max(self.bandwidth_seconds, self.flops_seconds, self.interconnect_seconds)

    @property
    def bound(self) -> str:
        """Which one that is."""
        roofs = {
            "HBM bandwidth": self.bandwidth_seconds,
            "FLOPs": self.flops_seconds,
            "interconnect": self.interconnect_seconds,
        }
        return max(roofs, key=lambda name: roofs[name])


def floor(plan: Plan) -> Floor:
    """The floor of one round of a plan."""
    moe, topology = plan.model.config.moe, plan.topology
    parts, tokens = topology.width("expert"), plan.batch * plan.verify_length
    held = moe.experts // parts
    slowest = expected_largest(parts, held, _chance(moe.experts, moe.top_k, tokens))
    layers = sum(layer.mlp == "moe" for layer in plan.model.config.layers)
    ways = {way: _experts(plan, sent, layers) for way, sent in messages(*_expert_rows(plan)).items()}
    way = chosen_way(*_expert_rows(plan))
    collectives = tuple(_collectives(plan, ways[way]))
    least = _seconds(collectives) - _seconds(ways[way]) + min(map(_seconds, ways.values()))
    return Floor(
        expected_distinct(moe.experts, moe.top_k, tokens),
        slowest,
        _bytes_read(plan, slowest / held),
        _flops(plan, tokens * moe.top_k),
        collectives,
        least,
        plan.device,
    )


def _drafts(plan: Plan) -> bool:
    """Whether a round has a drafter's pass."""
    return plan.verify_length > 1


def _bytes_read(plan: Plan, share_of_experts: float) -> dict[str, float]:
    """Weights once a pass and committed keys and values, by component; a few embedding rows are not counted."""
    read: dict[str, float] = {}
    for weight in plan.model.weights:
        nbytes: float = weight.nbytes(plan.topology)
        name = weight.component
        if weight.path[-1] == "embedding" or (name == "drafter" and not _drafts(plan)):
            continue
        if weight.path[-1] == "lm_head":
            name, nbytes = "LM head", nbytes * (1 + _drafts(plan))  # all of the backbone is read between its two passes
        elif name == "experts":
            nbytes *= share_of_experts
        read[name] = read.get(name, 0) + nbytes
    read["caches"] = sum(
        layers * plan.group_batch * _seen(plan, attention) * _kv_bytes(plan, attention)
        for _, attention, layers in _passes(plan)
    )
    return read


def _passes(plan: Plan) -> Iterator[tuple[str, AttentionConfig, int]]:
    """Every kind of attention that a round runs: its component, sizes and layers."""
    for attention, layers in plan.model.attentions():
        yield "attention", attention, layers
    if plan.model.drafter is not None and _drafts(plan):
        yield "drafter", plan.model.drafter.attention, plan.model.drafter.num_layers


def _seen(plan: Plan, attention: AttentionConfig) -> int:
    """Committed positions that a sequence's block reads."""
    return plan.context if attention.visible_keys is None else min(plan.context, attention.visible_keys - 1)


def _kv_bytes(plan: Plan, attention: AttentionConfig) -> int:
    """Of one position of one layer, on one device."""
    return plan.kv_heads(attention) * (attention.qk_dim + attention.v_dim) * ACTIVATION_BYTES


def _flops(plan: Plan, choices: int) -> dict[str, float]:
    """Two a weight and row, and two a head dimension, row and key; norms and sums are not counted.

    Args:
        plan: The plan.
        choices: Tokens times experts a token.
    """
    topology, config = plan.topology, plan.model.config
    parts = topology.width("expert")
    busiest = expected_largest(parts, choices, 1 / parts)
    flops: dict[str, float] = {}
    for weight in plan.model.weights:
        name, parameters = weight.component, weight.parameters(topology)
        if name == "experts":  # rows of the device that has most, each through one of the experts it holds
            rows = busiest / (config.moe.experts // parts)
        elif weight.path[-1] == "lm_head":
            name, rows = "LM head", _head_rows(plan, plan.rows + (plan.rows - plan.group_batch) * _drafts(plan))
        elif name == "drafter":
            rows = _drafter_rows(plan, weight)
        else:
            rows = 0 if name == "norms" or weight.path[-1] == "embedding" else plan.rows
        if rows:
            flops[name] = flops.get(name, 0) + 2 * rows * parameters
    for name, attention, layers in _passes(plan):
        rows = plan.group_batch * (plan.block if name == "drafter" else plan.verify_length)
        pairs = layers * rows * attention.heads // topology.width("heads") * _seen(plan, attention)
        flops[name] += 2 * pairs * (attention.qk_dim + attention.v_dim)
    return flops


def _drafter_rows(plan: Plan, weight: Weight) -> int:
    """Rows of a round that a weight of the drafter sees: the block's, the verified ones' features, or both."""
    block, verified = plan.group_batch * plan.block * _drafts(plan), plan.rows * _drafts(plan)
    match weight.path[-1]:
        case "fc":
            return verified
        case "k" | "v":
            return block + verified
        case name if name.endswith("norm") or name in ("mask_embedding", "sink"):
            return 0
    return block


def _head_rows(plan: Plan, rows: int) -> int:
    """Rows whose logits a device computes: its group's, or everyone's where groups share a vocabulary."""
    return rows * plan.topology.data_parallel if _vocabulary_over_data(plan.topology) else rows


def _vocabulary_over_data(topology: Topology) -> bool:
    return topology.width("vocab") > topology.attention_tensor


def _collectives(plan: Plan, experts: Sequence[Collective]) -> Iterator[Collective]:
    """Those of a round, none over a single device. Rows are bfloat16, the experts' sums float32."""
    config, drafter, rows = plan.model.config, plan.model.drafter, plan.rows
    layers = len(config.layers)
    moe = sum(layer.mlp == "moe" for layer in config.layers)
    row, dense = config.hidden_size * ACTIVATION_BYTES, plan.topology.width("mlp") > 1
    yield from _summed(plan, "embedding", 1, rows * row, _vocabulary_over_data(plan.topology))
    yield from _summed(plan, "attention output", layers, rows * row)
    if dense:
        yield from _summed(plan, "dense MLP", layers - moe, rows * row)
    yield from experts
    yield from _picked(plan, "LM head", rows, row)
    if drafter is not None and _drafts(plan):
        block = plan.group_batch * drafter.block_size * row
        yield from _summed(plan, "drafter: anchor", 1, plan.group_batch * row, _vocabulary_over_data(plan.topology))
        yield from _summed(plan, "drafter: attention", drafter.num_layers, block)
        yield from _summed(plan, "drafter: MLP", drafter.num_layers, block)
        yield from _picked(plan, "drafter: LM head", plan.rows - plan.group_batch, row)


def _seconds(collectives: Sequence[Collective]) -> float:
    return sum(c.seconds for c in collectives)


def _expert_rows(plan: Plan) -> tuple[Topology, int, int, int, int]:
    """What `messages` of a layer's experts are asked about."""
    config = plan.model.config
    return plan.topology, plan.rows, config.hidden_size, config.moe.top_k, ACTIVATION_BYTES


def _experts(plan: Plan, sent: Sequence[Message], layers: int) -> list[Collective]:
    """The messages of so many layers, as collectives."""
    return [
        collective
        for m in sent
        for collective in _over(
            plan, f"experts: {m.what}", m.kind, " ".join(m.over.axes), layers * m.count, round(m.payload)
        )
    ]


def _summed(plan: Plan, what: str, count: int, group_bytes: int, over_data: bool = False) -> Iterator[Collective]:
    """The sum of a group's rows over its devices; with `over_data`, of all groups' rows over all of them."""
    if over_data:
        everyone = plan.topology.data_parallel * group_bytes
        yield from _over(plan, what, "reduce-scatter", "data", count, everyone)
    yield from _over(plan, what, "all-reduce", "tensor", count, group_bytes)


def _picked(plan: Plan, what: str, rows: int, row_bytes: int) -> Iterator[Collective]:
    """The largest logit of each row and its index, from the devices that share a vocabulary."""
    data = plan.topology.data_parallel
    if _vocabulary_over_data(plan.topology):  # all rows' logits of few ids, swapped for few rows' logits of more
        yield from _over(plan, f"{what}: rows", "all-gather", "data", 1, data * rows * row_bytes)
        logits = data * rows * plan.model.config.vocab_size // plan.topology.width("vocab") * SUM_BYTES
        yield from _over(plan, f"{what}: logits", "all-to-all", "data", 1, logits)
    tensor = plan.topology.attention_tensor
    yield from _over(plan, what, "all-gather", "tensor", 1, tensor * rows * _PICK_BYTES)


def _over(plan: Plan, what: str, kind: str, axes: str, count: int, payload: int) -> Iterator[Collective]:
    """Collectives over one mesh axis or both, within linked devices first where these are fewer."""
    size, device = math.prod(plan.topology.axes[axis] for axis in axes.split()), plan.device
    if size == 1 or not count or not payload:
        return
    stride = plan.topology.attention_tensor if axes == "data" else 1
    inner = max(1, min(size, device.linked_devices // stride))
    if kind == "all-to-all":
        linked, beyond = (inner - 1) / size * payload, (size - inner) / size * payload
    else:
        outer, times = -(-size // inner), 2 if kind == "all-reduce" else 1
        linked = times * (inner - 1) / inner * payload
        beyond = times * (outer - 1) / outer * payload / inner
    network = device.network_bytes_per_s or device.link_bytes_per_s
    seconds = count * (linked / device.link_bytes_per_s + beyond / network)
    over = "all" if " " in axes else axes
    yield Collective(what, kind, over, size, count, payload, linked + beyond, seconds)
