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

import functools
import math
from typing import Any

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


class AttentionSynapse(nn.Module):
    """Short-term memory of one attention layer's edges.

    Parameters: `expression` (H, X + 1), raw; `strength` (H,); `presynapse.scalars`.

    Attributes:
        cache: The key-value cache of the pass that the layer is in the midst of.
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
        self.step: int | None = None

    def reset_parameters(self) -> None:
        init.constant_(self.strength, self.settings.strength)
        init.zeros_(self.expression)

    def forward(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        softcap: float | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attention's output, (B, S, H, width of a value).

        Where all strengths are 0 it is bitwise that of "sdpa" (with `softcap`, of softmax as "eager" writes it), with the
        gradients of synapses; dropout in training, which draws, excepted.

        Args:
            module: The attention layer.
            query, key, value: (B, H, S, any), (B, groups, n, any), (B, groups, n, any).
            mask: Bool or additive (B, 1 or H, S, n); None is causal.
            softcap: Logits are softcap * tanh(logits / softcap).
            position_ids: (B or 1, S); a text begins where it is 0.
            cache: What has already taken in these keys.
        """
        if query.shape[1] != len(self.strength):
            raise ConfigurationError(
                f"{type(module).__name__} has {query.shape[1]} heads and its synapses {len(self.strength)}: attach them "
                f"to a model whose layers all have config.num_attention_heads heads."
            )
        idle = not bool(self.strength.any())
        # Passes that go on from a cache do not train.
        learns = self.strength.requires_grad and torch.is_grad_enabled() and key.shape[2] == query.shape[2]
        draws = dropout > 0 and module.training
        if idle and not learns:
            return self._without(module, query, key, value, mask, scaling, dropout, softcap)
        cache = None if idle else cache
        # Pools are sums and differences of what is nearly equal: never in less than fp32.
        with torch.autocast(query.device.type, enabled=False):
            key, value = key.to(query.dtype), value.to(query.dtype)
            found = self._attend(query, key, value, mask, scaling, dropout, softcap, position_ids, cache)
        if idle and not draws:
            with torch.no_grad():
                plain = self._without(module, query, key, value, mask, scaling, 0.0, softcap)
            return plain + (found - found.detach())
        return found

    def _without(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        dropout: float,
        softcap: float | None,
    ) -> Tensor:
        if softcap is None:
            plain: Tensor = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)[0]
            return plain
        groups = query.shape[1] // key.shape[1]
        logits = query @ repeat_kv(key, groups).transpose(2, 3) * scaling
        logits = softcap * torch.tanh(logits / softcap)
        end = query.shape[2] if mask is None and query.shape[2] > 1 else key.shape[2]
        logits, value = logits[..., :end], repeat_kv(value, groups)[:, :, :end]
        logits = _masked(logits, None if mask is None else mask[..., :end], 0, end - query.shape[2])
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(query.dtype)
        return (F.dropout(weights, dropout, module.training) @ value).transpose(1, 2).contiguous()

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        dropout: float,
        softcap: float | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        settings, top_k = self.settings, self.settings.attention_top_k
        batch, heads, tokens, _ = query.shape
        memory, total = None, tokens
        if cache is not None:
            memory, total = edge_memory(cache, self.layer, tokens, settings.attention_chunk)
        end = min(total, key.shape[2])
        first = total - end
        groups = heads // key.shape[1]
        key, value = repeat_kv(key[:, :, :end], groups), repeat_kv(value[:, :, :end], groups)
        mask = None if mask is None else mask[..., :end]
        known = memory if memory is not None and memory.get_seq_length() else None
        real = None if mask is None else _own(mask)
        chunks = read_chunks((batch, tokens), settings.attention_chunk, query.device, real, position_ids, known)
        count = chunks.count[:, -end:]
        old = self._drives_of(known, chunks.past, first) if known is not None and chunks.past else None

        rates = self._rates()
        weights = chunk_weights(rates, settings.attention_chunk)
        resting = rest(rates)
        forgets = 1.0 - math.exp(-settings.attention_chunk / GAIN_TIME)
        strength = self.strength.float().unsqueeze(1)
        septin = settings.attention_barrier * torch.sigmoid(self.expression[:, -1].float())
        state, running = self._start(known, first, resting, batch)
        sample = self._sampler((batch, heads, end))
        output = query.new_zeros(batch, tokens, heads, value.shape[-1])
        parts, kept = [], [query.new_zeros(batch, tokens, heads, 2 * top_k + 1, dtype=torch.float32)]
        width = chunks.past + tokens
        for number, (low, high) in enumerate(chunks.ranges):
            n = max(end - width + high, state.calcium.shape[2])
            state = _grown(state, resting, n, batch)
            if not chunks.plain:
                assert chunks.begins is not None
                state, running = _renewed(state, running, resting, chunks.begins[number])
            probability = release_probability(state.calcium, rates)
            content = released_content(state, probability, rates)
            start, stop = max(low, chunks.past) - chunks.past, high - chunks.past
            drives: list[tuple[Tensor, Tensor]] = []
            used = released = torch.zeros_like(running)
            if old is not None and low < chunks.past:
                assert chunks.member is not None
                between = slice(low, min(high, chunks.past))
                theirs = (chunks.member[:, between] == number)[:, None, :, None]
                told, column = old[0][:, :, between] * theirs, old[1][:, :, between]
                used, released = told[..., :-1].sum((2, 3)), told[..., -1].sum(2)
                # Keys that a sliding window has left behind are no longer there to be driven.
                drives.append((told[..., :-1] * (column >= 0), column.clamp(0, n - 1)))
            if stop > start:
                heard = strength * torch.log(settings.epsilon + content / running.unsqueeze(-1))
                logits = (query[:, :, start:stop] @ key[:, :, :n].transpose(2, 3)).float() * scaling
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                column = end - tokens
                distance = count[:, column + start : column + stop, None] - count[:, None, :n]
                distance = distance.clamp(min=0).float()
                share = (distance / (distance + settings.attention_barrier_length)).unsqueeze(1)
                logits = logits + heard.unsqueeze(2) - (strength * septin.unsqueeze(1)).unsqueeze(1) * share
                here = None if mask is None else mask[:, :, start:stop, :n]
                given = torch.softmax(_masked(logits, here, start, column), dim=-1)
                strongest = given.topk(min(top_k + 1, n), dim=-1)
                missing = top_k + 1 - min(top_k + 1, n)
                drive, index = (F.pad(part, (0, missing)) for part in strongest)
                drive, index = drive[..., :top_k] - drive[..., top_k:], index[..., :top_k]
                passed = F.dropout(given, dropout, self.training).to(value.dtype) @ value[:, :, :n]
                passed = passed.transpose(1, 2)
                if chunks.plain:
                    parts.append(passed)
                else:
                    assert chunks.member is not None
                    mine = chunks.member[:, chunks.past + start : chunks.past + stop] == number
                    drive = drive * mine[:, None, :, None]
                    output = _placed(output, passed, mine, start, stop)
                carried = content.unsqueeze(2).expand(-1, -1, stop - start, -1).gather(3, index)
                carried = (drive * carried).detach().sum(3, keepdim=True)
                used, released = used + drive.detach().sum((2, 3)), released + carried.sum((2, 3))
                if memory is not None:
                    told = torch.cat([(index + first).float(), drive.detach(), carried], dim=-1).transpose(1, 2)
                    if chunks.plain:
                        kept.append(told)
                    else:
                        kept[0][:, start:stop] = torch.where(mine[..., None, None], told, kept[0][:, start:stop])
                drives.append((drive, index))
            last = number + 1 == len(chunks.ranges)
            if chunks.plain and last and not (chunks.last_is_full and memory is not None):
                break
            slots = None if chunks.slot is None else chunks.slot[:, low:high]
            summed = self._sum_up(drives, slots, weights, n)
            moved = advance(state, summed, weights, rates, sample)[0]
            mean = released / used.clamp_min(1e-20)
            followed = torch.where(used > 0, running + forgets * (mean - running), running)
            if chunks.plain:
                state, running = moved, followed
            else:
                assert chunks.full is not None
                state, running = _where(chunks.full[number], (moved, followed), (state, running))
        if memory is not None:
            remembered = torch.cat(kept[1:], dim=1) if chunks.plain else kept[0]
            self._remember(memory, chunks, remembered, _grown(state, resting, end, batch), running, first)
        return torch.cat(parts, dim=1) if chunks.plain else output

    # -- state ---------------------------------------------------------------------------------------------------------

    def _rates(self) -> Rates:
        """Of every head's edges, (H, 1): they hold for all its keys."""
        rates = self.presynapse.rates(self.expression[:, :-1], self.settings.attention_turn)
        return Rates(*(rate.unsqueeze(1) for rate in rates))

    def _start(
        self, known: EdgeMemory | None, first: int, resting: PresynapticState, batch: int
    ) -> tuple[PresynapticState, Tensor]:
        """State of the keys (B, H, n) and running mean (B, H): the memory's, or at rest."""
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
        return PresynapticState(*(part[:, :, max(gone, 0) :] for part in state)), packed[:, :, 0, 0]

    @staticmethod
    def _remember(
        memory: EdgeMemory, chunks: Chunks, kept: Tensor, state: PresynapticState, running: Tensor, first: int
    ) -> None:
        batch, tokens = kept.shape[:2]
        count = chunks.count[:, -tokens:].expand(batch, -1)
        real = torch.ones_like(count) if chunks.real is None else chunks.real
        head = torch.stack([count, real], dim=-1).float()
        keys = torch.cat([head, kept.flatten(2)], dim=-1).unsqueeze(1)
        memory.update(keys, keys[..., :0])
        mean = running[..., None, None].expand(-1, -1, 1, STATE_SIZE)
        memory.state, memory.first = torch.cat([mean, state.pack()], dim=2).detach(), first

    # -- drive ---------------------------------------------------------------------------------------------------------

    def _drives_of(self, known: EdgeMemory, tokens: int, first: int) -> tuple[Tensor, Tensor]:
        """Of the memory's last tokens the drives, what they released in all, and the columns they went to.

        (B, H, tokens, K + 1) and (B, H, tokens, K).
        """
        assert known.keys is not None
        told = known.keys[:, 0, -tokens:, 2:].unflatten(2, (len(self.strength), -1)).transpose(1, 2)
        top_k = self.settings.attention_top_k
        return told[..., top_k:], told[..., :top_k].long() - first

    def _sum_up(
        self, drives: list[tuple[Tensor, Tensor]], slots: Tensor | None, weights: ChunkWeights, n: int
    ) -> Drive:
        """Drives and columns (B, H, L, K) of a chunk's tokens, as the state of n keys needs them."""
        drive, column = (torch.cat(parts, dim=2) for parts in zip(*drives, strict=True))
        batch, heads, length, _ = drive.shape
        per_slot = weights.weights.squeeze(-1)
        if slots is None:
            weight = per_slot[:, None, :length].transpose(2, 3)
        else:
            weight = per_slot[:, slots].transpose(2, 3)
        weighted = (drive.unsqueeze(0) * weight.unsqueeze(-1)).flatten(3)
        sums = weighted.new_zeros(3, batch, heads, n)
        sums = sums.scatter_add(3, column.flatten(2).expand(3, -1, -1, -1), weighted)
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


def _masked(logits: Tensor, mask: Tensor | None, start: int, column: int) -> Tensor:
    """Logits (B, H, L, n) of the queries from `start` on, the first of all queries being in `column`."""
    lowest = torch.finfo(logits.dtype).min
    if mask is not None:
        return logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else (logits + mask).clamp(min=lowest)
    length, n = logits.shape[2:]
    own = column + start + torch.arange(length, device=logits.device)
    return logits.masked_fill(torch.arange(n, device=logits.device) > own.unsqueeze(1), lowest)


def _placed(output: Tensor, passed: Tensor, mine: Tensor, start: int, stop: int) -> Tensor:
    """`output` (B, S, H, any) with what passed to the queries of a chunk among those of a range."""
    middle = torch.where(mine[..., None, None], passed, output[:, start:stop])
    return torch.cat([output[:, :start], middle, output[:, stop:]], dim=1)


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
            f'living_moe.attach_attention_synapses(model), convert with synapse={{"attention": True}}, or choose another '
            f"attn_implementation."
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
    if position_ids is not None and position_ids.dim() != 2:
        position_ids = None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return synapse(module, query, key, value, attention_mask, scaling, dropout, softcap, position_ids, cache), None


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
        if hasattr(module, "synapse"):
            raise ConfigurationError(f"{type(model).__name__} has attention synapses already; attach them once.")
        config: Any = getattr(module, "config", model.config)
        like = next((p for p in module.parameters() if p.is_floating_point()), None)
        synapse = AttentionSynapse(settings, config.num_attention_heads, module.layer_idx)  # type: ignore[arg-type]
        module.synapse = synapse.train(module.training)
        if like is not None:
            module.synapse.to(like.device, like.dtype)
        module.register_forward_pre_hook(_hand_over_cache, with_kwargs=True)
    model.set_attn_implementation(SYNAPTIC)


def _hand_over_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if module.config._attn_implementation == SYNAPTIC:
        module.synapse.cache = kwargs.get("past_key_values")


__all__ = [
    "HEAD_MOLECULES",
    "SYNAPTIC",
    "AttentionSynapse",
    "attach_attention_synapses",
    "attention_layers",
    "register_synaptic_attention",
    "synaptic_attention_forward",
]
