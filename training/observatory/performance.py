"""What each expert is worth on a text: its contribution to the loss, what it reads, and what it costs.

**Leave-one-out.** The layer's output without one expert's term: of y = sum_i w_i E_i(x), the term of that expert is
taken out of every token of the text, and all that follows is computed again. Nobody takes its place and the other
weights stay as they are: re-routing would measure how well the runner-up stands in, and the death of an expert leaves
heirs and tombstones that make it a third question. It is also the quantity whose derivative the estimate takes, so the
two can be compared. The contribution is the loss without the expert minus the loss with it, in nats per token of the
text: above 0 the expert helps. Contributions do not add up: experts stand in for each other.

**First-order estimate.** With a gate g = 1 on every term, -dL/dg summed over the tokens of an expert is what the first
order of Taylor's series says of g going to 0 (Molchanov et al. 2019, arXiv:1906.10771). One backward pass gives it for
all experts. It is exact for a small change of g, and says little about removal once training has settled: to scale the
whole term of an expert is to scale its `down_proj`, along which the loss is then flat. On a trained model its sum over
tokens cancels (docs/experts.md has the figures), so beside it stands the **sensitivity**, the sum of the magnitudes
|dL/dg| token by token, from the same pass (Molchanov et al. 2017, arXiv:1611.06440). It has no sign: how much an expert
matters, not whether it helps. `agreement` compares the ranks of both, and of the load alone, with leave-one-out.

**Specialisation** is what the choice of this expert tells about the class of the token it reads, in nats: the
divergence of the classes it reads from those its whole layer reads. Its mean over a layer, weighted by tokens, is the
mutual information of expert and class (`collapse.routing_mutual_information`, plain). The same numbers bias it upwards
that bias mutual information: few tokens, many classes.

Measuring changes nothing: vitals, receptive fields, keys, searches, gradients and random states stay as they are. A
router that searches compares every key meanwhile, so that no result depends on what the search remembers.

N blocks of text, S tokens of a block, B pairs of expert and block in one pass, K places, E alive experts of a layer in
slot order, H hidden, C classes of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn

from living_moe.configuration.errors import TrainingError
from living_moe.configuration.slabs import is_frozen
from living_moe.modeling_living_moe import LivingMoeForCausalLM
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.training.collapse import TOKEN_CLASSES, token_classes
from living_moe.training.data import TokenBlocks
from living_moe.training.evaluation import in_eval_mode

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reading:
    """One pass over a text: who served which token, at what loss, and what the gradient says. On the CPU.

    Attributes:
        ids_NS: int64, the text.
        loss_NS: fp64 (N, S - 1), loss of the token after each but the last of its block, nats.
        index: Per living layer int32 (N, S, K), experts in slot order, negative where a place is not used.
        weights: Per living layer fp32 (N, S, K), routing weights.
        first_order: Per living layer fp64 (E,), the estimate of each expert's contribution, nats per scored token.
        sensitivity: As `first_order`, of magnitudes.
    """

    ids_NS: Tensor
    loss_NS: Tensor
    index: list[Tensor]
    weights: list[Tensor]
    first_order: list[Tensor]
    sensitivity: list[Tensor]


@dataclass(frozen=True)
class ExpertRow:
    """One expert of the leaderboard.

    Attributes:
        layer, uid: Who.
        frozen, width, ternary, field: Whether it is frozen, its hidden units, whether its weights are ternary, and its
            receptive field.
        age: Optimizer steps lived.
        tokens: Pairs of token and expert in the text.
        load: Its tokens in multiples of the uniform share of its layer's.
        weight: Its mean routing weight per token; 0 without any.
        contribution: Leave-one-out, nats per scored token of the text; above 0 it helps. None where not measured.
        error: Standard error of the contribution, blocks of text taken for independent; None with one block.
        first_order: The estimate of the contribution.
        sensitivity: What its tokens' gates say without their signs, nats per scored token.
        per_gflop: Contribution, in nats summed over the text, per 1e9 operations the expert spent on it: two for a
            multiplication and addition, one for ternary weights, which only add. None without tokens.
        per_mib: Contribution in nats per token, per MiB of the expert's weights as they are held.
        specialisation: Nats, see the module.
        entropy: Of the classes it reads, nats: 0 for one class.
        reads: The class whose share of what it reads exceeds its share of what the layer reads by most; None where none
            does, or classes are token ids.
    """

    layer: int
    uid: int
    frozen: bool
    width: int
    ternary: bool
    field: int
    age: int
    tokens: int
    load: float
    weight: float
    contribution: float | None
    error: float | None
    first_order: float
    sensitivity: float
    per_gflop: float | None
    per_mib: float | None
    specialisation: float
    entropy: float
    reads: str | None

    @property
    def worth(self) -> float:
        """What rows are ranked by: the measured contribution, or else the sensitivity."""
        return self.sensitivity if self.contribution is None else self.contribution


@dataclass(frozen=True)
class Agreement:
    """Spearman's rank correlations with leave-one-out, of one layer's experts or of all (`layer` None).

    A correlation is None where fewer than three experts, or equal ranks, leave nothing to correlate. `load` is what
    tokens alone would say, without any gradient: an estimate that does not beat it is not worth its pass.
    """

    layer: int | None
    experts: int
    first_order: float | None
    sensitivity: float | None
    load: float | None


@dataclass(frozen=True)
class Performance:
    """What `measure` found. `rows` by layer, then slot; `agreement` is empty where nothing was left out.

    `loss` is of the whole text, nats per token; `tokens` and `blocks` its size, `step` the model's optimizer steps.
    `classes` counts, per living layer, what each expert read of each of `TOKEN_CLASSES`, (E, C); none without a
    tokenizer.
    """

    rows: list[ExpertRow]
    agreement: list[Agreement]
    reading: Reading
    loss: float
    tokens: int
    blocks: int
    step: int
    classes: list[Floats]

    def leaderboard(self, top: int | None = None) -> list[ExpertRow]:
        """The `top` experts of greatest worth (None: all), best first; layer and uid decide between equals."""
        return sorted(self.rows, key=lambda row: (-row.worth, row.layer, row.uid))[:top]


def measure(
    model: LivingMoeForCausalLM,
    blocks: TokenBlocks | Tensor,
    *,
    tokenizer: Any = None,
    batch_size: int = 8,
    max_blocks: int = 32,
    leave_out: bool = True,
) -> Performance:
    """Everything about every expert, on a sample of text.

    Leaving out costs, per expert, the layers from its own on, over the blocks in which it served a token; the rest
    costs one forward and backward pass.

    Args:
        model: Not its data-parallel wrapper.
        blocks: `TokenBlocks`, or token ids (N, S).
        tokenizer: Names the classes of tokens; without one every token id is a class of its own.
        batch_size: Blocks per pass.
        max_blocks: At most so many, spread evenly over the text; 0 is all.
        leave_out: Measure contributions; otherwise they are estimated only.

    Raises:
        TrainingError: The text has no token to score.
    """
    reading = read(model, sample_blocks(blocks, max_blocks), batch_size=batch_size)
    deltas = leave_one_out(model, reading, batch_size=batch_size) if leave_out else None
    class_V, names = _classes(tokenizer, reading.ids_NS)
    class_NS = class_V[reading.ids_NS].numpy()
    rows, classes = [], []
    for layer, block in enumerate(model.living_blocks):
        experts, kinds = len(block.population.members), len(names) if names is not None else int(class_NS.max()) + 1
        classes.append(class_counts(reading.index[layer], class_NS, experts, kinds))
        delta_EN = None if deltas is None else deltas[layer].numpy()
        rows += _rows_of(model, block, reading, delta_EN, classes[-1], names)
    return Performance(
        rows=rows,
        agreement=[] if deltas is None else agreement(rows),
        reading=reading,
        loss=float(reading.loss_NS.mean()),
        tokens=reading.loss_NS.numel(),
        blocks=len(reading.ids_NS),
        step=model.steps_lived,
        classes=[] if names is None else classes,
    )


def sample_blocks(blocks: TokenBlocks | Tensor, most: int) -> Tensor:
    """At most `most` blocks (0: all), spread evenly over the text, int64 (N, S)."""
    count = len(blocks) if most <= 0 else min(most, len(blocks))
    if count == 0 or blocks[0].numel() < 2:
        raise TrainingError(f"{count} blocks leave no token to score; give a block of at least two tokens.")
    return torch.stack([blocks[number * len(blocks) // count] for number in range(count)]).to("cpu", torch.int64)


# -- passes over the text ----------------------------------------------------------------------------------------------


@contextmanager
def undisturbed(model: LivingMoeForCausalLM) -> Iterator[None]:
    """Evaluation mode in which passes leave no trace and gradients reach gates only.

    Gradients are on, under which plastic keys never move; no parameter takes one, so no graph is built without a gate.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    routers = [block.router for block in model.living_blocks]
    searches = [router.search for router in routers]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for router in routers:
            router.search = None
        with in_eval_mode(model), torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for router, search in zip(routers, searches, strict=True):
            router.search = search


@contextmanager
def pool_hook(block: LivingMoeBlock, change: Any) -> Iterator[None]:
    """Calls `change(index_TK, weights_TK)` for new weights before a layer's experts compute."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_TH, index_TK, weights_TK, *rest = arguments
        return hidden_TH, index_TK, change(index_TK, weights_TK), *rest

    handle = block.experts.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _losses(model: LivingMoeForCausalLM, ids_BS: Tensor) -> Tensor:
    """Loss of each next token, fp32 (B, S - 1), on the head's device."""
    logits = model(input_ids=ids_BS.to(model.device), use_cache=False).logits[:, :-1].float()
    targets = ids_BS[:, 1:].to(logits.device)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


class _Gates:
    """Keeps one layer's choices over the passes, and multiplies its weights by a gate of 1 that takes a gradient."""

    def __init__(self, experts: int):
        self.index: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.signed_E, self.magnitude_E = torch.zeros(2, experts, dtype=torch.float64)
        self.gate_TK = torch.empty(0)

    def __call__(self, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        self.index.append(index_TK.to("cpu", torch.int32))
        self.weights.append(weights_TK.detach().to("cpu", torch.float32))
        self.gate_TK = torch.ones_like(weights_TK, requires_grad=True)
        return weights_TK * self.gate_TK

    def take(self, grad_TK: Tensor) -> None:
        """Credit the last pass's experts with what their gates' gradient says."""
        used_TK = self.index[-1] >= 0
        place, grad = self.index[-1][used_TK].long(), grad_TK.to("cpu", torch.float64)[used_TK]
        self.signed_E.index_add_(0, place, -grad)
        self.magnitude_E.index_add_(0, place, grad.abs())


def read(model: LivingMoeForCausalLM, ids_NS: Tensor, *, batch_size: int = 8) -> Reading:
    """Read a text once, forwards and backwards.

    Args:
        ids_NS: int64 (N, S), S >= 2.
    """
    gates = [_Gates(len(block.population.members)) for block in model.living_blocks]
    losses = []
    with undisturbed(model), ExitStack() as hooks:
        for block, gate in zip(model.living_blocks, gates, strict=True):
            hooks.enter_context(pool_hook(block, gate))
        for ids_BS in ids_NS.split(batch_size):
            loss_BS = _losses(model, ids_BS)
            for gate, grad_TK in zip(
                gates, torch.autograd.grad(loss_BS.sum(), [gate.gate_TK for gate in gates]), strict=True
            ):
                gate.take(grad_TK)
            losses.append(loss_BS.detach().to("cpu", torch.float64))
    loss_NS = torch.cat(losses)
    return Reading(
        ids_NS=ids_NS,
        loss_NS=loss_NS,
        index=[torch.cat(gate.index).view(*ids_NS.shape, -1) for gate in gates],
        weights=[torch.cat(gate.weights).view(*ids_NS.shape, -1) for gate in gates],
        first_order=[gate.signed_E / loss_NS.numel() for gate in gates],
        sensitivity=[gate.magnitude_E / loss_NS.numel() for gate in gates],
    )


def leave_one_out(model: LivingMoeForCausalLM, reading: Reading, *, batch_size: int = 8) -> list[Tensor]:
    """Per living layer, what each block of text loses without each expert: fp64 (E, N), nats summed over its tokens.

    A pass begins at the expert's own layer, with what that layer received in the full model, and holds the blocks of
    different experts side by side. Where an expert served no token of a block, the loss stays as it is: exactly 0.
    """
    ids_NS = reading.ids_NS
    backbone: Any = model.model.backbone
    result = []
    with undisturbed(model):
        begin: _Begin | None = None
        for layer, (block, decoder_layer) in enumerate(zip(model.living_blocks, backbone.living_layers, strict=True)):
            begin = _Begin(decoder_layer, _received(model, decoder_layer, ids_NS, begin, batch_size))
            experts = len(block.population.members)
            # Column 0 takes the places that nobody uses.
            served_NE = torch.zeros(len(ids_NS), experts + 1, dtype=torch.bool)
            served_NE.scatter_(1, reading.index[layer].flatten(1).long().clamp(min=-1) + 1, True)
            delta_EN = torch.zeros(experts, len(ids_NS), dtype=torch.float64)
            for pairs in served_NE[:, 1:].T.nonzero().split(batch_size):
                expert_B, block_B = pairs.unbind(1)
                with (
                    begin.at(backbone, block_B),
                    pool_hook(block, _Without(expert_B.repeat_interleave(ids_NS.shape[1]))),
                ):
                    loss_BS = _losses(model, ids_NS[block_B]).to("cpu", torch.float64)
                delta_EN[expert_B, block_B] = (loss_BS - reading.loss_NS[block_B]).sum(1)
            result.append(delta_EN)
    return result


@dataclass(frozen=True)
class _Without:
    """Takes one expert's term out of each token's output."""

    expert_T: Tensor

    def __call__(self, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        gone_TK = index_TK == self.expert_T.to(index_TK.device).unsqueeze(1)
        return weights_TK.masked_fill(gone_TK, 0.0)


@dataclass(frozen=True)
class _Begin:
    """A decoder layer of the backbone, and what it received from each block of text."""

    layer: nn.Module
    hidden_NSH: Tensor

    @contextmanager
    def at(self, backbone: Any, block_B: Tensor) -> Iterator[None]:
        """Passes over these blocks begin at the layer: those below pass on what they get, and it gets its inputs."""
        hidden_BSH = self.hidden_NSH[block_B.to(self.hidden_NSH.device)]
        below = list(backbone.layers)[: [*backbone.layers].index(self.layer)]
        # Device hooks shadow `forward` too, and get theirs back.
        shadowed = [layer.__dict__.get("forward") for layer in below]
        handle = self.layer.register_forward_pre_hook(lambda _, arguments: (hidden_BSH, *arguments[1:]))
        for layer in below:
            layer.forward = _pass_on
        try:
            yield
        finally:
            handle.remove()
            for layer, forward in zip(below, shadowed, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward


def _pass_on(hidden_BSH: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_BSH


def _received(
    model: LivingMoeForCausalLM, layer: nn.Module, ids_NS: Tensor, begin: _Begin | None, batch_size: int
) -> Tensor:
    """What a decoder layer receives from each block of text, (N, S, H); from an earlier layer's inputs where known."""
    received: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: received.append(arguments[0]))
    try:
        for block_B in torch.arange(len(ids_NS)).split(batch_size):
            with ExitStack() as stack:
                if begin is not None:
                    stack.enter_context(begin.at(model.model.backbone, block_B))
                _losses(model, ids_NS[block_B])
    finally:
        handle.remove()
    return torch.cat(received)


# -- numbers of the leaderboard ----------------------------------------------------------------------------------------


def _classes(tokenizer: Any, ids_NS: Tensor) -> tuple[Tensor, Sequence[str] | None]:
    """Class of every token id, int64 (V,), and the classes' names; without a tokenizer each id is one, without name."""
    largest = int(ids_NS.max())
    if tokenizer is None:
        return torch.arange(largest + 1), None
    class_V = token_classes(tokenizer)
    # Models have rows that no tokenizer uses.
    missing = torch.full((max(0, largest + 1 - len(class_V)),), TOKEN_CLASSES.index("other"))
    return torch.cat([class_V, missing]), TOKEN_CLASSES


def class_counts(index_NSK: Tensor, class_NS: npt.NDArray[np.int64], experts: int, classes: int) -> Floats:
    """How often each expert read each class, (E, C)."""
    index = index_NSK.numpy().astype(np.int64)
    used = index >= 0
    pairs = index[used] * classes + np.broadcast_to(class_NS[..., None], index.shape)[used]
    return np.bincount(pairs, minlength=experts * classes).reshape(experts, classes).astype(np.float64)


def specialisation(counts_EC: Floats) -> tuple[Floats, Floats]:
    """Of each expert the divergence of what it reads from what its layer reads, and its entropy; nats, (E,) each.

    0 for both where an expert read nothing.
    """
    total_E = counts_EC.sum(1)
    share_EC = counts_EC / np.maximum(total_E, 1)[:, None]
    all_C = counts_EC.sum(0) / max(total_E.sum(), 1)
    logs_EC = np.log(np.where(share_EC > 0, share_EC, 1.0))
    all_logs_C = np.log(np.where(all_C > 0, all_C, 1.0))
    entropy_E = -(share_EC * logs_EC).sum(1)
    divergence_E = (share_EC * (logs_EC - all_logs_C)).sum(1)
    return np.maximum(divergence_E, 0.0), np.maximum(entropy_E, 0.0)


def operations(block: LivingMoeBlock, slab: str) -> int:
    """Arithmetic operations of one expert on one token: 6 H I; ternary weights add and do not multiply, 3 H I."""
    pool = block.experts
    return (3 if pool.is_ternary(slab) else 6) * pool.hidden_size * pool.width(slab)


def _rows_of(
    model: LivingMoeForCausalLM,
    block: LivingMoeBlock,
    reading: Reading,
    delta_EN: Floats | None,
    counts_EC: Floats,
    names: Sequence[str] | None,
) -> list[ExpertRow]:
    """The rows of one layer, in slot order."""
    members, pool = block.population.members, block.experts
    index_NSK, weights_NSK = reading.index[block.layer], reading.weights[block.layer]
    used = index_NSK >= 0
    place = index_NSK[used].long()
    tokens_E = torch.bincount(place, minlength=len(members)).tolist()
    weight_E = torch.bincount(place, weights_NSK[used].double(), minlength=len(members)).tolist()
    divergence_E, entropy_E = specialisation(counts_EC)
    all_C = counts_EC.sum(0) / max(counts_EC.sum(), 1)
    scored, total = reading.loss_NS.numel(), max(sum(tokens_E), 1)
    age_E = model.vitals(block.layer)["age"].tolist()
    rows = []
    for member in members:
        number, tokens = member.index, tokens_E[member.index]
        contribution = error = per_gflop = per_mib = None
        if delta_EN is not None:
            contribution = float(delta_EN[number].sum()) / scored
            per_mib = contribution / (pool.bytes_per_expert(member.slab) / 2**20)
            if (blocks := delta_EN.shape[1]) > 1:
                error = float(delta_EN[number].std(ddof=1)) * math.sqrt(blocks) / scored
            if tokens:
                per_gflop = contribution * scored / (tokens * operations(block, member.slab) / 1e9)
        reads = None
        if names is not None and tokens:
            # A difference of shares, not a ratio: a rare class must not win by its rarity.
            more_C = counts_EC[number] / tokens - all_C
            reads = names[int(more_C.argmax())] if more_C.max() > 0 else None
        rows.append(
            ExpertRow(
                layer=block.layer,
                uid=member.uid,
                frozen=is_frozen(member.slab),
                width=pool.width(member.slab),
                ternary=pool.is_ternary(member.slab),
                field=member.field,
                age=int(age_E[number]),
                tokens=tokens,
                load=tokens * len(members) / total,
                weight=weight_E[number] / max(tokens, 1),
                contribution=contribution,
                error=error,
                first_order=float(reading.first_order[block.layer][number]),
                sensitivity=float(reading.sensitivity[block.layer][number]),
                per_gflop=per_gflop,
                per_mib=per_mib,
                specialisation=float(divergence_E[number]),
                entropy=float(entropy_E[number]),
                reads=reads,
            )
        )
    return rows


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation, ties at their mean rank; None for fewer than three values, or where all of one are equal."""
    if len(first) < 3:
        return None
    ranks = [rankdata(values) - (len(first) + 1) / 2 for values in (first, second)]
    lengths = [float(np.linalg.norm(rank)) for rank in ranks]
    return float(ranks[0] @ ranks[1]) / (lengths[0] * lengths[1]) if all(lengths) else None


def agreement(rows: Sequence[ExpertRow]) -> list[Agreement]:
    """How the estimates, and the load alone, rank the experts of each layer and of all, beside leave-one-out."""
    measured = [row for row in rows if row.contribution is not None]
    layers: list[int | None] = [*sorted({row.layer for row in measured}), None]
    found = []
    for layer in layers:
        mine = [row for row in measured if layer in (None, row.layer)]
        truth = [row.contribution or 0.0 for row in mine]
        signed, magnitude, load = (
            spearman(truth, [getattr(row, name) for row in mine]) for name in ("first_order", "sensitivity", "load")
        )
        found.append(Agreement(layer, len(mine), signed, magnitude, load))
    return found
