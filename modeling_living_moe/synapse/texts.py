"""Which tokens of a pass belong to which text and chunk of it, and the cache that carries texts between passes.

Synapses count in tokens of a text: padding is not there, a text packed behind another begins anew, and a chunk is c
tokens from a multiple of c on, whatever pieces a text is read in. So the tokens of a pass are laid out on a grid of
texts and chunks, with the tokens of the cache before them as far as they share their chunk.

B rows, S tokens of this pass, P tokens before it, G texts, J chunks, c tokens of a chunk, F numbers kept per token.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer

#: What the cache keeps of a token before its drives: its number in its text, from 1, and whether it is no padding.
_COUNT, _REAL, _HEAD = 0, 1, 2


class SynapseLayer(DynamicLayer, DummyLayer):
    """The drives of past tokens, as one more layer of a key-value cache, and the state they have led to.

    Being a layer, it follows beam reordering, cropping, batch selection and reset. It keeps, in fp32, every past
    token's number, whether it is real, and its drives in every living layer as keys (B, 1, P, 2 + F), and values of
    width 0. Drives determine the state, so `state` (B, any), that of each row's last full chunk, only saves reading
    them again, and goes when cropping reaches behind it.
    """

    supports_early_init = False
    # A cache that compiles (static) still must after this layer joins it: masks are built differently for it.
    is_compileable = True
    is_croppable = True

    def __init__(self, chunk: int) -> None:
        DynamicLayer.__init__(self)
        self.chunk = chunk
        self.state: Tensor | None = None
        #: Of the population whose drives these are.
        self.version = 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.get_seq_length():
            assert self.keys is not None
            left = self.keys[:, 0, :tokens_to_remove, _COUNT]
            gone = self.keys[:, 0, tokens_to_remove:, _COUNT]
            last = left[:, -1:] if left.shape[1] else gone[:, :1] * 0
            counts = torch.cat([last, gone], dim=1)
            # As long as no text ends and no chunk is left, the last full chunk stays the last.
            grows = bool((counts[:, 1:] >= counts[:, :-1]).all())
            chunks = counts // self.chunk
            if not grows or bool((chunks[:, 0] != chunks[:, -1]).any()):
                self.state = None
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        self.state = None
        super().reset()

    def reorder_cache(self, beam_idx: Any) -> None:
        if self.state is not None:
            self.state = self.state.index_select(0, beam_idx.to(self.state.device))
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, dim=0)
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state[indices, ...]
        super().batch_select_indices(indices)


def synapse_layer(cache: Cache | None) -> SynapseLayer | None:
    """The layer of `cache` that holds drives, if it holds any."""
    layers = [] if cache is None else cache.layers
    layer = next((layer for layer in reversed(layers) if isinstance(layer, SynapseLayer)), None)
    return layer if layer is not None and layer.get_seq_length() else None


@dataclass
class Texts:
    """The grid of one forward pass.

    Attributes:
        shape: B and S.
        grid: G, J and c.
        plain: Whether the grid is the tokens in their order, with a rest of the last chunk behind them.
        last_is_full: Whether some text fills its last chunk.
        place: int64 (B, S), place of each token on the flat grid; of padding, the place behind the last.
        real: Bool (B, S).
        count: int64 (B, S), number of the token in its text, from 1; padding carries its predecessor's.
        past_of: int64 (G, J, c), which token of the flat cache is there, or -1; None where none is.
        past_chunks: Chunks with tokens of the cache.
        first: int64 (G,), row of the cache's state that a text goes on from, or -1 where it begins at rest; None where
            all do.
        end_text, end_chunks: int64 (B,), the last text of each row, and how many of its chunks on the grid are full.
    """

    shape: tuple[int, int]
    grid: tuple[int, int, int]
    plain: bool
    last_is_full: bool
    place: Tensor | None = None
    real: Tensor | None = None
    count: Tensor | None = None
    past_of: Tensor | None = None
    past_chunks: int = 0
    first: Tensor | None = None
    end_text: Tensor | None = None
    end_chunks: Tensor | None = None

    def lay_out(self, values: Tensor) -> Tensor:
        """(B * S, any) of the tokens -> (G, J, c, any) on the grid, zeros where no new token is."""
        texts, chunks, length = self.grid
        if self.plain:
            batch, tokens = self.shape
            values = values.reshape(batch, tokens, -1)
            missing = chunks * length - tokens
            if missing:
                values = torch.nn.functional.pad(values, (0, 0, 0, missing))
            return values.view(texts, chunks, length, -1)
        assert self.place is not None
        flat = values.new_zeros(texts * chunks * length + 1, values.shape[-1])
        return flat.index_copy(0, self.place.flatten(), values)[:-1].view(texts, chunks, length, -1)

    def gather(self, grid: Tensor) -> Tensor:
        """(G, J, c, any) -> (B * S, any); zeros for padding."""
        batch, tokens = self.shape
        if self.plain:
            return grid.reshape(batch, -1, grid.shape[-1])[:, :tokens].reshape(batch * tokens, -1)
        assert self.place is not None
        flat = torch.nn.functional.pad(grid.flatten(0, 2), (0, 0, 0, 1))
        return flat.index_select(0, self.place.flatten())

    def past(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """What the cache kept (B * P, any), on the first chunks of the grid, and where: bool (G, chunks, c, 1)."""
        assert self.past_of is not None
        index = self.past_of[:, : self.past_chunks]
        return kept[index.clamp(min=0)], (index >= 0).unsqueeze(-1)

    def full_chunks(self, device: torch.device) -> Tensor:
        """Which chunks of the grid have all their tokens, the cache's included: bool (G, J)."""
        texts, chunks, length = self.grid
        if self.plain:
            return (torch.arange(1, chunks + 1, device=device) * length <= self.shape[1]).expand(texts, -1)
        assert self.place is not None
        there = torch.zeros(texts * chunks * length + 1, dtype=torch.bool, device=device)
        there[self.place.flatten()] = True
        there_GJc = there[:-1].view(texts, chunks, length)
        if self.past_of is not None:
            there_GJc = there_GJc | (self.past_of >= 0)
        return there_GJc.all(2)

    def to(self, device: torch.device | str) -> Texts:
        """The same on another device."""
        moved = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)  # type: ignore[arg-type]


def one_text_per_row(real: Tensor | None, position_ids: Tensor | None) -> bool:
    """Whether a pass without a past has neither padding nor a text that begins within a row."""
    padded = real is not None and not bool(real.all())
    return not padded and (position_ids is None or not bool((position_ids[:, 1:] == 0).any()))


class TokenCounts(NamedTuple):
    """Tokens of a pass counted, each (B, S).

    Attributes:
        real: Bool, False for padding.
        start: Bool, the first tokens of texts that begin in the pass.
        in_row: int64, real tokens of the row up to and with this one.
        in_text: int64, those of its text in this pass.
    """

    real: Tensor
    start: Tensor
    in_row: Tensor
    in_text: Tensor


def count_tokens(
    shape: tuple[int, int], device: torch.device, real: Tensor | None, position_ids: Tensor | None
) -> TokenCounts:
    """Count the tokens of a pass; arguments as of `read_texts`."""
    real = torch.ones(shape, dtype=torch.bool, device=device) if real is None else real.to(device)
    start = torch.zeros_like(real)
    if position_ids is not None:
        start = (position_ids.to(device).expand(shape) == 0) & real
    in_row = real.long().cumsum(1)
    before = torch.where(start, in_row - 1, 0).cummax(1).values
    return TokenCounts(real, start, in_row, in_row - before)


def read_texts(
    shape: tuple[int, int],
    chunk: int,
    device: torch.device,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    history: SynapseLayer | None = None,
) -> Texts:
    """Lay out a pass.

    Args:
        shape: B and S.
        chunk: c.
        mask: Bool (B, S), False for padding; None is no padding.
        position_ids: int (B, S) or (1, S); a text begins where it is 0. None is one text per row.
        history: What the cache keeps; None when these tokens are the first.
    """
    batch, tokens = shape
    if history is None and one_text_per_row(mask, position_ids):
        return Texts(shape, (batch, -(-tokens // chunk), chunk), True, tokens % chunk == 0)
    real, start, in_row, in_text = count_tokens(shape, device, mask, position_ids)
    begins = (start & (in_row == 1)).any(1)
    text = (start.long().cumsum(1) - begins.long().unsqueeze(1)).clamp(min=0)
    goes_on = ~begins
    origin = torch.zeros(batch, dtype=torch.int64, device=device)
    past = origin
    if history is not None:
        assert history.keys is not None
        head = history.keys[:, 0, :, :_HEAD].to(device)
        past = torch.where(goes_on, head[:, -1, _COUNT].long(), 0)
        if history.state is not None:
            origin = past // chunk * chunk
    own = text == 0
    count = in_text + torch.where(own, past.unsqueeze(1), 0)
    slot = count - 1 - torch.where(own, origin.unsqueeze(1), 0)
    texts = int(text.max()) + 1
    longest = int(torch.maximum(torch.where(real, slot + 1, 0).amax(), (past - origin).amax()))
    chunks = max(1, -(-longest // chunk))
    size = batch * texts * chunks * chunk
    rows = torch.arange(batch, device=device).unsqueeze(1)
    place = torch.where(real, (rows * texts + text) * (chunks * chunk) + slot, size)
    end_text = text[:, -1]
    end = torch.where(end_text == 0, count[:, -1] - origin, count[:, -1])
    laid = Texts(shape, (batch * texts, chunks, chunk), False, longest == chunks * chunk, place, real, count)
    laid.end_text, laid.end_chunks = rows[:, 0] * texts + end_text, end // chunk
    if history is not None:
        laid.past_chunks = -(-int((past - origin).amax()) // chunk)
        laid.past_of = _past_places(head, goes_on, origin, size, texts, chunks * chunk).view(laid.grid)
        if history.state is not None:
            laid.first = torch.full((batch, texts), -1, device=device)
            laid.first[:, 0] = torch.where(goes_on, rows[:, 0], -1)
            laid.first = laid.first.flatten()
    return laid


def _past_places(head: Tensor, goes_on: Tensor, origin: Tensor, size: int, texts: int, length: int) -> Tensor:
    """Flat grid -> which token of the flat cache is there, or -1. `head` (B, P, 2): numbers, and whether real."""
    batch, past = head.shape[:2]
    column = torch.arange(past, device=head.device)
    rows = torch.arange(batch, device=head.device).unsqueeze(1)
    count, real = head[..., _COUNT].long(), head[..., _REAL] > 0
    begun = torch.where(real & (count == 1), column, 0).amax(1, keepdim=True)
    there = real & (column >= begun) & (count > origin.unsqueeze(1)) & goes_on.unsqueeze(1)
    place = torch.where(there, rows * texts * length + count - 1 - origin.unsqueeze(1), size)
    found = torch.full((size + 1,), -1, device=head.device)
    found[place.flatten()] = (rows * past + column).flatten()
    return found[:-1]


def remember_texts(cache: Cache, texts: Texts, kept: Tensor, state: Tensor, chunk: int, version: int) -> None:
    """Append a pass to `cache`.

    Call it after the backbone's forward: caches that create layers lazily number them by position, so ours must come
    last. A cache without layers has cached nothing and is left alone.

    Args:
        kept: (B, S, F), what each token leaves; zeros for padding.
        state: (B, any), of each row's last full chunk.
        version: Of the population.
    """
    layer = next((layer for layer in reversed(cache.layers) if isinstance(layer, SynapseLayer)), None)
    if layer is None:
        if not cache.layers:
            return
        layer = SynapseLayer(chunk)
        cache.layers.append(layer)
    batch, tokens = texts.shape
    if texts.plain:
        count = torch.arange(1, tokens + 1, device=kept.device).expand(batch, -1)
        real = torch.ones_like(count)
    else:
        assert texts.count is not None and texts.real is not None
        count, real = texts.count.to(kept.device), texts.real.to(kept.device)
    head = torch.stack([count, real], dim=-1).to(kept.dtype)
    keys = torch.cat([head, kept], dim=-1).unsqueeze(1)
    layer.update(keys, keys[..., :0])
    layer.state, layer.version = state, version


def kept_of(history: SynapseLayer) -> Tensor:
    """What the cache keeps of its tokens, (B, P, F)."""
    assert history.keys is not None
    return history.keys[:, 0, :, _HEAD:]


__all__ = [
    "SynapseLayer",
    "Texts",
    "TokenCounts",
    "count_tokens",
    "kept_of",
    "one_text_per_row",
    "read_texts",
    "remember_texts",
    "synapse_layer",
]
