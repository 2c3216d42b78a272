"""The oracle: one living layer computed slowly and obviously, one token at a time.

Shares no code with the fast path beyond reading the same tables. Differentiable, for gradient tests. Never used
outside tests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.population import ROOT_FIELD, Member


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
    slab = block.experts.slab(member.slab)
    gate, up = F.linear(hidden, slab.gate_up_proj[member.row]).chunk(2)
    return F.linear(slab.act_fn(gate) * up, slab.down_proj[member.row])


def reference_route(block: LivingMoeBlock, hidden: Tensor, field: int) -> list[tuple[Tensor, Member]]:
    """The chosen experts of one token with their weights."""
    rule = block.router.scoring
    candidates = []
    clades = dict.fromkeys(m.clade for m in block.population.members if m.field in (ROOT_FIELD, field))
    for clade in clades:
        server = reference_server(block, hidden, clade, field)
        key = block.router.keys[server.slab][server.row]
        logit = F.linear(hidden.float(), key.float()) if rule.fp32_logits else F.linear(hidden, key)
        candidates.append((logit, server))
    logits = torch.stack([logit for logit, _ in candidates])
    if rule.function == "softmax":
        scores = F.softmax(logits, dim=-1, dtype=torch.float32)
        choice = scores
    else:
        scores = logits.float().sigmoid()
        bias = torch.stack([block.population.table(m.slab).bias[m.row] for _, m in candidates])
        choice = scores + bias
        if rule.num_groups > 1:
            best = []
            for group in range(rule.num_groups):
                inside = [choice[n] for n, (_, m) in enumerate(candidates) if m.group == group]
                best.append(float(sum(sorted((float(c) for c in inside), reverse=True)[:2])) if inside else -torch.inf)
            allowed = sorted(range(rule.num_groups), key=lambda g: best[g], reverse=True)[: rule.top_groups]
            open_ = torch.tensor([m.group in allowed for _, m in candidates])
            choice = choice.masked_fill(~open_, -torch.inf)
    chosen = sorted(range(len(candidates)), key=lambda n: float(choice[n]), reverse=True)[: rule.top_k]
    weights = torch.stack([scores[n] for n in chosen])
    if rule.normalise:
        weights = weights / (weights.sum() + rule.epsilon)
    weights = weights * rule.scaling
    if rule.cast_weights:
        weights = weights.to(logits.dtype)
    return [(weights[place], candidates[n][1]) for place, n in enumerate(chosen)]


def reference_server(block: LivingMoeBlock, hidden: Tensor, clade: int, field: int) -> Member:
    """Which member of a clade serves this token: its field's, else the root's; among several, by the facets."""
    population = block.population
    family = [m for m in population.members if m.clade == clade]
    cell = [m for m in family if m.field == field] or [m for m in family if m.field == ROOT_FIELD]
    if len(cell) == 1:
        return cell[0]
    owners = {m.uid: m for m in cell}
    satisfied = []
    for leaf in population.leaves:
        if leaf.uid in owners:
            sides = []
            for facet, side in leaf.path:
                height = hidden.float() @ population.facet_normal[facet] + population.facet_offset[facet]
                sides.append((1 if float(height) >= 0 else -1) == side)
            if all(sides):
                satisfied.append(owners[leaf.uid])
    assert len(satisfied) == 1, f"clade {clade} has {len(satisfied)} servers for one token"
    return satisfied[0]
