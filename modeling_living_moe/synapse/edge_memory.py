"""Which chunk of its text each query is in, and what a key-value cache remembers of attention edges between passes.

The counting is that of `texts.py`: padding is not there, a text packed behind another begins anew, a chunk is c tokens
from a multiple of c on. Attention keeps its columns where the cache has them, so nothing is laid out on a grid: per
chunk a range of columns holds its queries in all rows. The cache's own layers remember: each gives way to one of a
subclass that takes an `EdgeMemory` along wherever beams, crops and choices of rows lead.

B rows, S tokens of this pass, W of them and of the cache's whose chunk is not closed, J chunks, c tokens of a chunk.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from living_moe.configuration.errors import ConfigurationError
from living_moe.modeling_living_moe.synapse.texts import SynapseLayer, count_tokens, one_text_per_row


class EdgeMemory(SynapseLayer):
    """Of one attention layer: the drives of past tokens, and the state of all edges at each row's last full chunk.

    Attributes:
        state: fp32 (B, H, 1 + n, 7), of n keys in a row from `first` on, behind one row of the running mean; keys
            behind these are at rest.
        first: The first of these keys, counted in columns of the whole text.
    """

    first = 0


class RemembersEdges:
    """Mixin over a class of cache layers; see `remembering`."""

    edges: EdgeMemory

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles name classes, and this one's is made at run time."""
        return _restored, (type(self).__bases__[1], self.__dict__)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # type: ignore[misc]
        self.edges.crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.edges.reset()

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.edges.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.edges.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.edges.batch_select_indices(indices)


@functools.cache
def remembering(layer_class: type) -> type:
    """`layer_class` with a memory of edges; built once per class of cache layers."""
    return type(f"Remembering{layer_class.__name__}", (RemembersEdges, layer_class), {"__module__": __name__})


def _restored(layer_class: type, attributes: dict[str, Any]) -> Any:
    remembers: Any = remembering(layer_class)
    layer = remembers.__new__(remembers)
    layer.__dict__.update(attributes)
    return layer


def edge_memory(cache: Cache, layer: int, tokens: int, chunk: int) -> tuple[EdgeMemory, int]:
    """The memory of a layer that has just taken in `tokens`, and how many the layer has seen in all.

    Raises:
        ConfigurationError: It has seen tokens that the memory has not.
    """
    own: Any = cache.layers[layer]
    if not isinstance(own, RemembersEdges):
        # CPython does not let an instance of these classes change its own.
        own = _restored(type(own), {**own.__dict__, "edges": EdgeMemory(chunk)})
        cache.layers[layer] = own
    total, known = int(own.get_seq_length()), own.edges.get_seq_length()
    if known != total - tokens:
        raise ConfigurationError(
            f"the cache holds {total - tokens} tokens of layer {layer} and the synapses of {known}: another attention "
            f"implementation read the others, so read the text anew with a new cache."
        )
    return own.edges, total


@dataclass
class Chunks:
    """The chunks of one pass.

    Attributes:
        past: Of the W columns, how many are the cache's.
        ranges: Per chunk the first of the columns that its tokens are in, in any row, and the one behind the last.
        count: int64 (B or 1, P + S), number of each token in its text, from 1; padding carries its predecessor's.
        real: Bool (B, S), False for padding; None where plain.
        plain: Whether chunk j is the columns from j c on in all rows, all of them at rest when the pass begins.
        last_is_full: plain: whether the last chunk has c tokens.
        member: int64 (B, W), chunk of each token, J for padding and what is in a closed chunk.
        slot: int64 (B, W), place in its chunk.
        begins, full: Bool (J, B), whether a text begins with the chunk, and whether the chunk has its c tokens.
    """

    past: int
    ranges: list[tuple[int, int]]
    count: Tensor
    real: Tensor | None = None
    plain: bool = True
    last_is_full: bool = False
    member: Tensor | None = None
    slot: Tensor | None = None
    begins: Tensor | None = None
    full: Tensor | None = None


def read_chunks(
    shape: tuple[int, int],
    chunk: int,
    device: torch.device,
    real: Tensor | None = None,
    position_ids: Tensor | None = None,
    memory: EdgeMemory | None = None,
) -> Chunks:
    """Find the chunks of a pass.

    Args:
        shape: B and S.
        chunk: c.
        real: Bool (B, S), False for padding; None is no padding.
        position_ids: int (B, S) or (1, S); a text begins where it is 0. None is one text per row.
        memory: Of the tokens before; None when these are the first.
    """
    batch, tokens = shape
    if memory is None and one_text_per_row(real, position_ids):
        ranges = [(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]
        count = torch.arange(1, tokens + 1, device=device).unsqueeze(0)
        return Chunks(0, ranges, count, last_is_full=tokens % chunk == 0)
    here, start, _, count = count_tokens(shape, device, real, position_ids)
    open_W, past = here, 0
    if memory is not None:
        assert memory.keys is not None
        head = memory.keys[:, 0, :, :2].to(device)
        old_count, old_real = head[..., 0].long(), head[..., 1] > 0
        count = count + torch.where(start.long().cumsum(1) > 0, 0, old_count[:, -1:])
        if memory.state is not None:
            # The last tokens of each row that its state has not heard of.
            left = old_count[:, -1:] % chunk
            old_open = old_real & (old_real.flip(1).cumsum(1).flip(1) <= left)
        else:
            old_open = old_real
        first = int(old_open.any(0).long().argmax()) if bool(old_open.any()) else old_open.shape[1]
        past = old_open.shape[1] - first
        open_W = torch.cat([old_open[:, first:], here], dim=1)
        count = torch.cat([old_count, count], dim=1)
    slot = (count[:, count.shape[1] - open_W.shape[1] :] - 1).clamp(min=0) % chunk
    member = (open_W & (slot == 0)).long().cumsum(1) - 1
    number = int(member.max()) + 1 if bool(open_W.any()) else 0
    member = torch.where(open_W, member, number)
    columns = torch.arange(open_W.shape[1], device=device).expand(batch, -1)
    size = torch.full((number + 1,), open_W.shape[1], device=device)
    lowest = size.scatter_reduce(0, member.flatten(), columns.flatten(), "amin")
    highest = torch.zeros_like(size).scatter_reduce(0, member.flatten(), columns.flatten() + 1, "amax")
    ones = torch.ones_like(member)
    tokens_of = torch.zeros(batch, number + 1, dtype=torch.int64, device=device).scatter_add(1, member, ones)
    firsts = open_W & (count[:, count.shape[1] - open_W.shape[1] :] == 1)
    begun = torch.zeros_like(tokens_of).scatter_add(1, torch.where(firsts, member, number), ones)
    return Chunks(
        past,
        list(zip(lowest[:number].tolist(), highest[:number].tolist(), strict=True)),
        count,
        here,
        plain=False,
        member=member,
        slot=slot,
        begins=(begun[:, :number] > 0).T,
        full=(tokens_of[:, :number] == chunk).T,
    )


__all__ = ["Chunks", "EdgeMemory", "RemembersEdges", "edge_memory", "read_chunks", "remembering"]
