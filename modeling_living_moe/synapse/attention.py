"""Attention edges: keys tire and are primed along a text (see `presynaptic.py`), and attention's logits know it.

Every key of every head is a bouton with pools of its own, one set per text. A query's logit of a key gets

    strength * (log(epsilon + q n / g) - barrier septin d / (d + barrier_length)),

q n what the key would release now, g the running mean of what released, per text and head and without a gradient, d the
tokens between key and query, septin in (0, 1) one more component of the head's expression. `strength` is learned per
head and starts at 0. Nothing in it depends on how long the text is: not the share of the barrier, and not the rates of
pools, which recover in turns of `attention_turn` tokens.

A query drives its `attention_top_k` strongest keys, each by how much more weight it has than the strongest key behind
them, so that drives are continuous where the choice flips; all keys are heard, or a tired key would gain by falling out
of the choice. Queries of a chunk hear the state at its start and drive it together at its end; keys born within are at
rest, as is every key that nothing has driven.

Who attends to whom is the mask's business, and rotary positions, caches and projections are the backbone's: this is an
attention function as Transformers calls it, registered under the name "synaptic".

B rows, S queries, n keys, H heads, K edges a query uses, L queries of a chunk, X molecules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.sections import SynapseConfig
from living_moe.modeling_living_moe.synapse.edge_memory import Chunks, EdgeMemory, edge_memory, read_chunks
from living_moe.modeling_living_moe.synapse.presynaptic import (
    MOLECULES,
    STATE_SIZE,
    ChunkWeights,
    Drive,
    Presynapse,
    PresynapticState,
    Rates,
    Sampler,
    advance,
    chunk_weights,
    release_probability,
    released_content,
    rest,
)
from living_moe.modeling_living_moe.synapse.router import FIRST_RELEASE, GAIN_TIME, binomial_release

#: What `attn_implementation` says to choose this implementation.
SYNAPTIC = "synaptic"
#: Components of a head's expression vector: an edge's, and the diffusion barrier, which only attention has.
HEAD_MOLECULES = (*MOLECULES, "septin")


class AttentionCall(NamedTuple):
    """What Transformers asks of an attention function.

    Attributes:
        layer: Gives the attention layer. (Of a module itself Accelerate, which moves all arguments of a module whose
            weights are offloaded to where it computes, would move the weights.)
        query, key, value: (B, H, S, any), (B, groups, n, any), (B, groups, n, any).
        mask: Bool or additive (B, 1 or H, S, n); None is causal.
        softcap: Logits are softcap * tanh(logits / softcap).
    """

    layer: Callable[[], nn.Module]
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    dropout: float = 0.0
    softcap: float | None = None

    def of_keys(self, n: int) -> AttentionCall:
        """Of the first n keys only, each once per head."""
        groups = self.query.shape[1] // self.key.shape[1]
        return self._replace(
            key=repeat_kv(self.key[:, :, :n], groups),
            value=repeat_kv(self.value[:, :, :n], groups),
            mask=None if self.mask is None else self.mask[..., :n],
        )

    def weights(self, start: int, stop: int, heard: Tensor) -> Tensor:
        """Of the queries from start to stop for the first n keys, of one per head; all queries are of the last tokens.

        Args:
            heard: What is added to logits, (B, H, stop - start, n).
        """
        n = heard.shape[-1]
        logits = (self.query[:, :, start:stop] @ self.key[:, :, :n].transpose(2, 3)).float() * self.scaling
        logits = _capped(logits, self.softcap) + heard
        mask = None if self.mask is None else self.mask[:, :, start:stop, :n]
        own = self.key.shape[2] - self.query.shape[2] + start
        return torch.softmax(_masked(logits, mask, own), dim=-1)

    def passed(self, weights: Tensor) -> Tensor:
        """What values give queries of these weights (B, H, L, n), the keys being one per head."""
        kept = F.dropout(weights, self.dropout, self.layer().training).to(self.value.dtype)
        return kept @ self.value[:, :, : weights.shape[-1]]


def plain_attention(call: AttentionCall) -> Tensor:
    """Attention without synapses, (B, S, H, width of a value)."""
    if call.softcap is None:
        plain: Tensor = sdpa_attention_forward(
            call.layer(), call.query, call.key, call.value, call.mask, dropout=call.dropout, scaling=call.scaling
        )[0]
        return plain
    # Without a mask, many queries are the first of a text, and a static cache has room behind them.
    own = 0 if call.query.shape[2] > 1 else call.key.shape[2] - 1
    call = call.of_keys(call.key.shape[2])
    logits = _capped(call.query @ call.key.transpose(2, 3) * call.scaling, call.softcap)
    weights = torch.softmax(_masked(logits, call.mask, own), dim=-1, dtype=torch.float32)
    return call.passed(weights.to(call.query.dtype)).transpose(1, 2).contiguous()


class AttentionSynapse(nn.Module):
    """Short-term memory of one attention layer's edges.

    Parameters: `expression` (H, X + 1), raw; `strength` (H,); `presynapse.scalars`.

    Attributes:
        cache: The key-value cache of the pass that the layer is in the midst of.
        position_ids: Of the pass that the model is in the midst of; some backbones do not hand them to attention.
        step: Optimizer steps lived, for what stochastic release draws; None draws from torch's own generator.
    """

    def __init__(self, settings: SynapseConfig, num_heads: int, layer: int = 0):
        super().__init__()
        self.settings = settings
        self.layer = layer
        self.presynapse = Presynapse()
        self.strength = nn.Parameter(torch.full((num_heads,), settings.strength))
        self.expression = nn.Parameter(torch.zeros(num_heads, len(HEAD_MOLECULES)))
        self.cache: Cache | None = None
        self.position_ids: Tensor | None = None
        self.step: int | None = None

    def reset_parameters(self) -> None:
        init.constant_(self.strength, self.settings.strength)
        init.zeros_(self.expression)

    def forward(self, call: AttentionCall, position_ids: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Attention's output, (B, S, H, width of a value).

        Where all strengths are 0 it is bitwise that of "sdpa" (with `softcap`, of "eager"), with the gradients of
        synapses; dropout in training, which draws, excepted.

        Args:
            position_ids: (B or 1, S); a text begins where it is 0.
            cache: What has already taken in these keys.
        """
        query, key, value = call.query, call.key, call.value
        if query.shape[1] != len(self.strength):
            raise ConfigurationError(
                f"{type(call.layer()).__name__} has {query.shape[1]} heads and its synapses {len(self.strength)}: "
                f"attach them to a model whose layers all have config.num_attention_heads heads."
            )
        idle = not bool(self.strength.any())
        # Passes that go on from a cache do not train.
        learns = self.strength.requires_grad and torch.is_grad_enabled() and key.shape[2] == query.shape[2]
        if idle and not learns:
            return plain_attention(call)
        if cache is None and key.shape[2] > query.shape[2]:
            raise ConfigurationError(
                f"{type(call.layer()).__name__} attends to {key.shape[2]} keys by {query.shape[2]} queries, and its "
                f"synapses were not given the cache these come from: the layer calls attention twice, or takes its "
                f"cache in a way of its own. Read with use_cache=False, or choose another attn_implementation."
            )
        if call.mask is not None and _shows_later(call.mask):
            raise ConfigurationError(
                f"the attention mask of {type(call.layer()).__name__} lets tokens attend to later ones (a prefix, an "
                f"image), and synapses remember along a text; choose another attn_implementation for it."
            )
        # Pools are sums and differences of what is nearly equal: never in less than fp32.
        with torch.autocast(query.device.type, enabled=False):
            call = call._replace(key=key.to(query.dtype), value=value.to(query.dtype))
            found = self._attend(call, position_ids, None if idle else cache)
        if idle and not (call.dropout > 0 and call.layer().training):
            with torch.no_grad():
                plain = plain_attention(call._replace(dropout=0.0))
            return plain + (found - found.detach())
        return found

    def _attend(self, call: AttentionCall, position_ids: Tensor | None, cache: Cache | None) -> Tensor:
        batch, heads, tokens, _ = call.query.shape
        length, memory, total = self.settings.attention_chunk, None, tokens
        if cache is not None:
            memory, total = edge_memory(cache, self.layer, tokens, length)
        # Static caches have room behind the last key, sliding windows have left the first behind.
        end = min(total, call.key.shape[2])
        first, before = total - end, end - tokens
        call = call.of_keys(end)
        known = memory if memory is not None and memory.get_seq_length() else None
        real = None if call.mask is None else _own(call.mask)
        chunks = read_chunks((batch, tokens), length, call.query.device, real, position_ids, known)
        count = chunks.count[:, -end:]

        rates = self._rates()
        weights, resting = chunk_weights(rates, length), rest(rates)
        forgets = 1.0 - math.exp(-length / GAIN_TIME)
        state, running = self._start(known, first, end, resting, batch)
        sample = self._sampler((batch, heads, end))
        outputs: list[_Piece] = []
        told: list[_Piece] = []
        for number, (low, high) in enumerate(chunks.ranges):
            n = max(before - chunks.past + high, state.calcium.shape[2])
            state = _grown(state, resting, n, batch)
            if chunks.begins is not None:
                state, running = _renewed(state, running, resting, chunks.begins[number])
            content = released_content(state, release_probability(state.calcium, rates), rates)
            mine = None if chunks.member is None else chunks.member[:, low:high] == number
            drives = [self._told(known, chunks.past)[:, :, low:high]] if known is not None and chunks.past else []
            start, stop = max(low - chunks.past, 0), high - chunks.past
            if stop > start:
                heard = self._heard(content, running, count[:, before + start : before + stop], count[:, :n])
                given = call.weights(start, stop, heard)
                drives.append(self._drives(given, content, first))
                own = None if mine is None else mine[:, start - stop :]
                outputs.append(_Piece(call.passed(given), start, own))
                told.append(_Piece(drives[-1].detach(), start, own))
            last = number + 1 == len(chunks.ranges)
            if chunks.plain and last and not (chunks.last_is_full and memory is not None):
                break
            drive = torch.cat(drives, dim=2)
            if mine is not None:
                drive = drive * mine[:, None, :, None]
            slots = None if chunks.slot is None else chunks.slot[:, low:high]
            moved = advance(state, self._sum_up(drive, first, slots, weights, n), weights, rates, sample)[0]
            followed = self._followed(running, drive.detach(), forgets)
            if chunks.full is None:
                state, running = moved, followed
            else:
                state, running = _where(chunks.full[number], (moved, followed), (state, running))
        if memory is not None:
            size = (batch, heads, tokens, 2 * self.settings.attention_top_k + 1)
            kept = _joined(told, size, torch.float32, call.query.device)
            self._remember(memory, chunks, kept, state, running, first)
        size = (batch, heads, tokens, call.value.shape[-1])
        return _joined(outputs, size, call.value.dtype, call.value.device).transpose(1, 2).contiguous()

    def _heard(self, content: Tensor, running: Tensor, of_query: Tensor, of_key: Tensor) -> Tensor:
        """What logits hear of pools and distance, (B, H, L, n).

        Args:
            content: q n of the keys, (B, H, n).
            running: g, (B, H).
            of_query, of_key: Numbers in their text, (B or 1, L) and (B or 1, n).
        """
        strength = self.strength.float()[:, None, None]
        septin = torch.sigmoid(self.expression[:, -1].float())[:, None, None]
        distance = (of_query.unsqueeze(2) - of_key.unsqueeze(1)).clamp(min=0).float().unsqueeze(1)
        share = distance / (distance + self.settings.attention_barrier_length)
        released = torch.log(self.settings.epsilon + content / running.unsqueeze(-1))
        return strength * released.unsqueeze(2) - strength * septin * self.settings.attention_barrier * share

    # -- state ---------------------------------------------------------------------------------------------------------

    def _rates(self) -> Rates:
        """Of every head's edges, (H, 1): they hold for all its keys."""
        rates = self.presynapse(self.expression[:, :-1], self.settings.attention_turn)
        return Rates(*(rate.unsqueeze(1) for rate in rates))

    def _start(
        self, known: EdgeMemory | None, first: int, end: int, resting: PresynapticState, batch: int
    ) -> tuple[PresynapticState, Tensor]:
        """State of the first of `end` keys (B, H, n), the others being at rest, and running mean (B, H)."""
        heads = len(self.strength)
        running = resting.calcium.new_full((batch, heads), FIRST_RELEASE)
        nothing = PresynapticState(*(part.new_zeros(batch, heads, 0, *part.shape[2:]) for part in resting))
        if known is None or known.state is None:
            return nothing, running
        packed = known.state.to(running.device)
        state, gone = PresynapticState.unpack(packed[:, :, 1:]), first - known.first
        if gone < 0:
            state = PresynapticState(
                *(torch.cat([_wide(part, batch, -gone), old], dim=2) for part, old in zip(resting, state, strict=True))
            )
        # A crop may have taken keys that the state knows, all of them at rest.
        gone = max(gone, 0)
        return PresynapticState(*(part[:, :, gone : gone + end] for part in state)), packed[:, :, 0, 0]

    @staticmethod
    def _remember(
        memory: EdgeMemory, chunks: Chunks, kept: Tensor, state: PresynapticState, running: Tensor, first: int
    ) -> None:
        batch, _, tokens, _ = kept.shape
        count = chunks.count[:, -tokens:].expand(batch, -1)
        real = torch.ones_like(count) if chunks.real is None else chunks.real
        head = torch.stack([count, real], dim=-1).float()
        keys = torch.cat([head, kept.transpose(1, 2).flatten(2)], dim=-1).unsqueeze(1)
        memory.update(keys, keys[..., :0])
        mean = running[..., None, None].expand(-1, -1, 1, STATE_SIZE)
        memory.state, memory.first = torch.cat([mean, state.pack()], dim=2).detach(), first

    # -- drive ---------------------------------------------------------------------------------------------------------
    #
    # Of a query and head one row of 2 K + 1 numbers: the keys it drives, in columns of the whole text, its drives, and,
    # without a gradient, what they released.

    def _drives(self, given: Tensor, content: Tensor, first: int) -> Tensor:
        """Rows (B, H, L, 2 K + 1) of the queries with these weights (B, H, L, n); content is that of the keys."""
        top_k, n = self.settings.attention_top_k, given.shape[-1]
        strongest = given.topk(min(top_k + 1, n), dim=-1)
        missing = top_k + 1 - min(top_k + 1, n)
        weight, column = (F.pad(part, (0, missing)) for part in strongest)
        drive, column = weight[..., :top_k] - weight[..., top_k:], column[..., :top_k]
        quanta = content.detach().unsqueeze(2).expand_as(given).gather(3, column)
        released = (drive.detach() * quanta).sum(3, keepdim=True)
        return torch.cat([(column + first).float(), drive, released], dim=-1)

    def _told(self, known: EdgeMemory, tokens: int) -> Tensor:
        """Rows of the memory's last tokens."""
        assert known.keys is not None
        return known.keys[:, 0, -tokens:, 2:].unflatten(2, (len(self.strength), -1)).transpose(1, 2)

    def _followed(self, running: Tensor, rows: Tensor, forgets: float) -> Tensor:
        """The running mean (B, H) after a chunk of these rows."""
        top_k = self.settings.attention_top_k
        used, released = rows[..., top_k:-1].sum((2, 3)), rows[..., -1].sum(2)
        return torch.where(used > 0, running + forgets * (released / used.clamp_min(1e-20) - running), running)

    def _sum_up(self, rows: Tensor, first: int, slots: Tensor | None, weights: ChunkWeights, n: int) -> Drive:
        """A chunk's rows, as the state of n keys from `first` on needs them. `slots` (B, L) are their places in it."""
        top_k = self.settings.attention_top_k
        column, drive = rows[..., :top_k].long() - first, rows[..., top_k:-1]
        # Keys that a sliding window has left behind are no longer there to be driven.
        drive = drive * ((column >= 0) & (column < n))
        if n == 0:
            return Drive(rows.new_zeros(2, *rows.shape[:2], 0), rows.new_zeros(*rows.shape[:2], 0), weights.tokens)
        per_slot = weights.weights.squeeze(-1)
        weight = per_slot[:, None, : rows.shape[2]] if slots is None else per_slot[:, slots]
        weighted = (drive.unsqueeze(0) * weight.transpose(2, 3).unsqueeze(-1)).flatten(3)
        sums = weighted.new_zeros(3, *rows.shape[:2], n)
        sums = sums.scatter_add(3, column.clamp(0, n - 1).flatten(2).expand(3, -1, -1, -1), weighted)
        return Drive(sums[:2], sums[2], weights.tokens)

    def _sampler(self, shape: tuple[int, ...]) -> Sampler | None:
        if not self.training or self.settings.mode != "stochastic":
            return None
        # Gradient checkpointing gives a recomputation the generator of its own pass.
        step = int(torch.randint(1 << 31, ())) if self.step is None else self.step
        seed = (self.settings.seed, step, self.layer, len(self.strength))
        return binomial_release(seed, self.settings.stochastic_share, shape, self.strength.device)


def _own(mask: Tensor) -> Tensor:
    """Which queries attend to themselves, as all do but padding: bool (B, S). Queries are the last columns."""
    own = mask[:, 0, :, mask.shape[3] - mask.shape[2] :].diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own == 0


def _shows_later(mask: Tensor) -> bool:
    """Whether a query may attend to a key behind its own; queries are the last columns."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return bool(seen.triu(1 + mask.shape[3] - mask.shape[2]).any())


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _masked(logits: Tensor, mask: Tensor | None, own: int) -> Tensor:
    """Logits (B, H, L, n) of queries, the first of which is the key in column `own`."""
    lowest = torch.finfo(logits.dtype).min
    if mask is not None:
        return logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (logits + mask).clamp(min=lowest)
    length, n = logits.shape[2:]
    columns = torch.arange(n, device=logits.device)
    return logits.masked_fill(columns > own + torch.arange(length, device=logits.device).unsqueeze(1), lowest)


class _Piece(NamedTuple):
    """What a chunk leaves of queries from `start` on, (B, H, L, any); `mine` (B, L): which are of this chunk."""

    value: Tensor
    start: int
    mine: Tensor | None


def _joined(pieces: list[_Piece], size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Pieces as one, (B, H, S, any); zeros for padding."""
    if pieces and all(piece.mine is None for piece in pieces):
        return torch.cat([piece.value for piece in pieces], dim=2)
    whole = torch.zeros(size, dtype=dtype, device=device)
    for value, start, mine in pieces:
        assert mine is not None
        whole[:, :, start : start + value.shape[2]] += torch.where(mine[:, None, :, None], value, 0.0)
    return whole


def _wide(part: Tensor, batch: int, n: int) -> Tensor:
    """One number per head, (H, 1, ...), for every row and n keys: (B, H, n, ...)."""
    return part.unsqueeze(0).expand(batch, -1, n, *part.shape[2:])


def _grown(state: PresynapticState, resting: PresynapticState, n: int, batch: int) -> PresynapticState:
    """The state with keys at rest behind its own, n in all."""
    missing = n - state.calcium.shape[2]
    if missing <= 0:
        return state
    return PresynapticState(
        *(torch.cat([old, _wide(part, batch, missing)], dim=2) for old, part in zip(state, resting, strict=True))
    )


def _where(
    rows: Tensor, this: tuple[PresynapticState, Tensor], that: tuple[PresynapticState, Tensor]
) -> tuple[PresynapticState, Tensor]:
    """State and running mean of `this` in some rows, (B,), of `that` in the others."""

    def chosen(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(rows.reshape(-1, *[1] * (a.dim() - 1)), a, b)

    state = PresynapticState(*(chosen(a, b) for a, b in zip(this[0], that[0], strict=True)))
    return state, chosen(this[1], that[1])


def _renewed(
    state: PresynapticState, running: Tensor, resting: PresynapticState, rows: Tensor
) -> tuple[PresynapticState, Tensor]:
    """State and running mean, at rest in the rows whose text begins."""
    batch, _, n = state.calcium.shape
    fresh = PresynapticState(*(_wide(part, batch, n) for part in resting))
    return _where(rows, (fresh, torch.full_like(running, FIRST_RELEASE)), (state, running))


# -- registration ------------------------------------------------------------------------------------------------------

#: What other models hand to attention functions that changes logits, and that this one does not compute.
_UNKNOWN = ("s_aux", "position_bias", "cache")


def synaptic_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function "synaptic", as Transformers' `sdpa_attention_forward` in arguments and results.

    Raises:
        ConfigurationError: The layer has no synapses, is not causal, or asks for what synapses do not know.
    """
    synapse = getattr(module, "synapse", None)
    if not isinstance(synapse, AttentionSynapse):
        raise ConfigurationError(
            f'attn_implementation is "{SYNAPTIC}" but this {type(module).__name__} has no synapses; call '
            f'living_moe.attach_attention_synapses(model), convert with synapse={{"attention": True}}, or choose '
            f"another attn_implementation."
        )
    cache, synapse.cache = synapse.cache, None
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ConfigurationError(
            f"{type(module).__name__} is not causal, and synapses remember along a text; choose another "
            f"attn_implementation for it."
        )
    if unknown := [name for name in _UNKNOWN if kwargs.get(name) is not None]:
        raise ConfigurationError(
            f"{type(module).__name__} asks attention for {unknown[0]}, which synapses do not know; choose another "
            f"attn_implementation for it."
        )
    position_ids = synapse.position_ids if position_ids is None else position_ids
    if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[1] != query.shape[2]):
        position_ids = None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = AttentionCall(lambda: module, query, key, value, attention_mask, scaling, dropout, softcap)
    return synapse(call, position_ids, cache), None


def register_synaptic_attention() -> None:
    """Make `attn_implementation="synaptic"` known to Transformers. Safe to call more than once."""
    AttentionInterface.register(SYNAPTIC, synaptic_attention_forward)
    AttentionMaskInterface.register(SYNAPTIC, sdpa_mask)


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """Modules of `model` that call a causal attention function: those with a place in a cache and a scaling."""
    return [
        module
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "scaling")
        and hasattr(module, "config")
        and getattr(module, "is_causal", False) is True
    ]


def attach_attention_synapses(model: PreTrainedModel, settings: SynapseConfig | None = None) -> None:
    """Give every attention layer of a Transformers model synapses, and make it use them.

    Living models have them by `synapse={"attention": True}`. The parameters are called `synapse` inside each attention
    layer, have its dtype and are part of the state dict: build the model, attach, then load what was saved.

    Args:
        model: With or without a head; changed in place.
        settings: What the section `synapse` says; None is its defaults.

    Raises:
        ConfigurationError: The model has no causal attention layers, or has synapses already.
    """
    layers = attention_layers(model)
    if not layers:
        raise ConfigurationError(
            f"{type(model).__name__} has no causal attention layers that call Transformers' attention functions."
        )
    settings = settings or SynapseConfig(attention=True)
    for module in layers:
        if getattr(module, "is_kv_shared_layer", False):
            raise ConfigurationError(
                f"layers of {type(model).__name__} share keys and values with earlier ones, whose synapses they would "
                f"use up; choose another model."
            )
        if hasattr(module, "synapse"):
            raise ConfigurationError(f"{type(model).__name__} has attention synapses already; attach them once.")
        config: Any = module.config
        like = next((p for p in module.parameters() if p.is_floating_point()), None)
        synapse = AttentionSynapse(settings, config.num_attention_heads, module.layer_idx)  # type: ignore[arg-type]
        module.synapse = synapse.train(module.training)
        if like is not None:
            module.synapse.to(like.device, like.dtype)
        module.register_forward_pre_hook(_hand_over_cache, with_kwargs=True)
    model.base_model.register_forward_pre_hook(_hand_over_positions, with_kwargs=True)
    model.set_attn_implementation(SYNAPTIC)


def _hand_over_positions(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for module in attention_layers(model):
        module.synapse.position_ids = kwargs.get("position_ids")  # type: ignore[union-attr]


def _hand_over_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if module.config._attn_implementation == SYNAPTIC:
        # Some call it layer_past.
        given = (*args, *kwargs.values())
        module.synapse.cache = next((value for value in given if isinstance(value, Cache)), None)


__all__ = [
    "HEAD_MOLECULES",
    "SYNAPTIC",
    "AttentionCall",
    "AttentionSynapse",
    "attach_attention_synapses",
    "attention_layers",
    "plain_attention",
    "register_synaptic_attention",
    "synaptic_attention_forward",
]
