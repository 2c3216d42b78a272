"""The oracle: one living layer computed slowly and obviously, one token at a time.

Shares no code with the fast path beyond reading the same tables. Differentiable, for gradient tests. Never used
outside tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.population import ROOT_FIELD, Member, Tombstone
from living_moe.modeling_living_moe.router import TEMPERATURE_RANGE
from living_moe.modeling_living_moe.selection import TopAny


def reference_forward(block: LivingMoeBlock, hidden_TH: Tensor, field_T: Tensor | None = None) -> Tensor:
    """What `block` must compute for each token: (T, H) -> (T, H), shared experts left out."""
    outputs = []
    for number, hidden in enumerate(hidden_TH):
        field = ROOT_FIELD if field_T is None else int(field_T[number])
        output = torch.zeros_like(hidden)
        for weight, member in reference_route(block, hidden, field):
            output = output + (weight * reference_expert(block, member, hidden)).to(output.dtype)
        outputs.append(output)
    return torch.stack(outputs)


def reference_expert(block: LivingMoeBlock, member: Member, hidden: Tensor) -> Tensor:
    slab = block.experts.weights(member.slab)
    gate_up, down = slab.gate_up_proj[member.row], slab.down_proj[member.row]
    is_ternary = block.experts.is_ternary(member.slab)
    if is_ternary:
        gate_up = torch.cat([straight_through(latent, ternary) for latent in gate_up.chunk(2)])
        down = straight_through(down, ternary)
        hidden = straight_through(hidden, eight_bits)
    gate, up = F.linear(hidden, gate_up).chunk(2)
    units = slab.act_fn(gate) * up
    side = block.postsynaptic
    if side is not None and not is_ternary:
        # Written out: the gained units and what the trace recalls, with random signs for sensors.
        g, table = side.settings.postsynaptic_gain, side.table(member.slab)
        gained = units * (1 + g * table.gain[member.row]).to(units.dtype)
        recalled = table.trace[member.row].to(units.dtype) @ (
            reference_sensors(side.rank, len(units)).to(units) @ units
        )
        return down @ gained + g * recalled
    return F.linear(straight_through(units, eight_bits) if is_ternary else units, down)


def reference_sensors(rank: int, width: int) -> Tensor:
    """Random signs over the root of their number, one row after the other."""
    drawn = torch.randint(2, (rank, width), generator=torch.Generator().manual_seed(rank * 2**20 + width))
    return torch.where(drawn == 1, 1.0, -1.0) / rank**0.5


def straight_through(latent: Tensor, quantise: Callable[[Tensor], Tensor]) -> Tensor:
    """`quantise(latent)`, up to the rounding of a sum, with the gradient of the identity."""
    return latent + (quantise(latent.detach()) - latent).detach()


def ternary(matrix: Tensor) -> Tensor:
    scale = matrix.float().abs().mean()
    return ((matrix.float() / scale).round().clamp(-1, 1) * scale).to(matrix.dtype) if scale else matrix


def eight_bits(token: Tensor) -> Tensor:
    step = token.float().abs().max() / 127
    return ((token.float() / step).round() * step).to(token.dtype) if step else token


def reference_route(block: LivingMoeBlock, hidden: Tensor, field: int) -> list[tuple[Tensor, Member]]:
    """The chosen experts of one token with their weights."""
    rule, population = block.router.scoring, block.population
    known: list[Member | Tombstone] = [*population.members, *population.tombstones]
    clades = dict.fromkeys(a.clade for a in known if a.field in (ROOT_FIELD, field))
    addresses = [reference_address(block, hidden, clade, field) for clade in clades]
    servers = [reference_server(block, address) for address in addresses]
    keys = [reference_key(block, address) for address in addresses]
    query = reference_query(block, hidden)
    logits = torch.stack([reference_score(block, query, key) for key, _ in keys])
    biases = torch.stack([bias for _, bias in keys])
    if isinstance(block.router.selection, TopAny):
        return reference_top_any(block.router.selection, logits, biases, servers)
    if rule.function == "softmax":
        scores = F.softmax(logits, dim=-1, dtype=torch.float32)
    else:
        scores = logits.float().sigmoid()
    choice = scores + biases
    if rule.function == "sigmoid":
        if rule.num_groups > 1:
            best = []
            for group in range(rule.num_groups):
                inside = [float(choice[n].detach()) for n, a in enumerate(addresses) if a.group == group]
                best.append(sum(sorted(inside, reverse=True)[:2]) if inside else -torch.inf)
            allowed = sorted(range(rule.num_groups), key=lambda g: best[g], reverse=True)[: rule.top_groups]
            choice = choice.masked_fill(torch.tensor([a.group not in allowed for a in addresses]), -torch.inf)
    open_cells = [n for n, server in enumerate(servers) if server is not None]
    chosen = sorted(open_cells, key=lambda n: float(choice[n].detach()), reverse=True)[: rule.top_k]
    weights = torch.stack([scores[n] for n in chosen])
    if rule.normalise:
        weights = weights / (weights.sum() + rule.epsilon)
    weights = weights * rule.scaling
    if rule.cast_weights:
        weights = weights.to(logits.dtype)
    return [(weights[place], server) for place, n in enumerate(chosen) if (server := servers[n]) is not None]


def reference_query(block: LivingMoeBlock, hidden: Tensor) -> Tensor:
    router = block.router
    if router.scoring.fp32_logits:
        hidden = hidden.float()
    query = hidden
    if router.query is not None:
        query = router.query.linear.weight.to(hidden.dtype) @ hidden
        if router.query.up is not None and router.query.down is not None:
            units = router.query.up.weight.to(hidden.dtype) @ hidden + router.query.up.bias.to(hidden.dtype)
            query = query + router.query.down.weight.to(hidden.dtype) @ F.silu(units)
    return query / query.norm().clamp_min(1e-12) if router.similarity == "cosine" else query


def reference_score(block: LivingMoeBlock, query: Tensor, key: Tensor) -> Tensor:
    key = key.to(query.dtype)
    if block.router.normalise_keys:
        key = key / key.norm().clamp_min(1e-12)
    temperature: Tensor | float = block.router.temperature
    if block.router.learned_temperature is not None:
        steps = torch.tanh(block.router.learned_temperature.log_ratio / math.log(TEMPERATURE_RANGE))
        temperature = temperature * TEMPERATURE_RANGE**steps
    return F.linear(query, key) / temperature


def reference_top_any(
    rule: TopAny, logits: Tensor, biases: Tensor, servers: list[Member | None]
) -> list[tuple[Tensor, Member]]:
    """Clades above the threshold, the best one in any case; at most `places`."""
    heights = logits.float() - rule.threshold
    choice = (heights + biases).detach().tolist()
    ranked = sorted((n for n, server in enumerate(servers) if server), key=lambda n: choice[n], reverse=True)
    chosen = [n for place, n in enumerate(ranked[: rule.places]) if place == 0 or choice[n] > 0]
    scores = logits.float()[chosen]
    if rule.gate == "relu":
        weights = [heights[n].clamp(min=0) for n in chosen]
        floor = 0.01 * torch.exp(heights[chosen[0]].clamp(max=0))
        weights[0] = torch.maximum(weights[0], floor)
    else:
        shares = scores.softmax(0)
        if rule.scoring.function == "sigmoid":
            shares = scores.sigmoid() / (scores.sigmoid().sum() + rule.scoring.epsilon)
        steps = [heights[n].sigmoid() for n in chosen]
        weights = [share * (1 + step - step.detach()) for share, step in zip(shares, steps, strict=True)]
    return [
        (weight * rule.scoring.scaling, server)
        for weight, n in zip(weights, chosen, strict=True)
        if (server := servers[n]) is not None
    ]


def reference_address(block: LivingMoeBlock, hidden: Tensor, clade: int, field: int) -> Member | Tombstone:
    """By which address a token sees a clade: its field's, else the root's; among several, by the facets."""
    population = block.population
    known: list[Member | Tombstone] = [*population.members, *population.tombstones]
    family = [address for address in known if address.clade == clade]
    cell = [a for a in family if a.field == field] or [a for a in family if a.field == ROOT_FIELD]
    if len(cell) == 1:
        return cell[0]
    of_uid = {a.uid: a for a in cell}
    satisfied = []
    for leaf in population.leaves:
        if leaf.uid in of_uid:
            sides = []
            for facet, side in leaf.path:
                height = hidden.detach().float() @ population.facet_normal[facet] + population.facet_offset[facet]
                sides.append((1 if float(height) >= 0 else -1) == side)
            if all(sides):
                satisfied.append(of_uid[leaf.uid])
    assert len(satisfied) == 1, f"clade {clade} has {len(satisfied)} addresses for one token"
    return satisfied[0]


def reference_key(block: LivingMoeBlock, address: Member | Tombstone) -> tuple[Tensor, Tensor]:
    """Key (H,) and selection bias of an address."""
    population = block.population
    if isinstance(address, Member):
        return block.router.keys[address.slab][address.row], population.table(address.slab).bias[address.row]
    row = [t.uid for t in population.tombstones].index(address.uid)
    return population.tombstone_key[row], population.tombstone_bias[row]


def reference_server(block: LivingMoeBlock, address: Member | Tombstone) -> Member | None:
    """Who serves at an address, if anybody does."""
    uid = address.uid if isinstance(address, Member) else address.heir
    return next((m for m in block.population.members if m.uid == uid), None)
