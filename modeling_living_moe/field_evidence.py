"""Running evidence along a text: the recurrence that computes it, and the cache layer that carries it between passes.

The module knows no densities; what the evidence is for is `receptive_field.py`'s.

B sequences, T tokens of this pass, P tokens before it, F newborn fields.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer


def linear_recurrence(keep: Tensor, added: Tensor, start: Tensor | None = None, reach: int | None = None) -> Tensor:
    """All states of e_t = keep_t * e_{t-1} + added_t, in log2(T) vectorised passes.

    Doubling scan (Hillis & Steele 1986, Commun. ACM 29(12)); linear in memory, no T x T matrix. Stable for keep in
    [0, 1].

    Args:
        keep: (B, T).
        added: (B, T, F), same dtype.
        start: (B, F), the state before the first token; None is zero.
        reach: No more than this many keeps in a row are other than 0, which saves passes; None promises nothing.

    Returns:
        (B, T, F).
    """
    span, reach = 1, added.shape[1] if reach is None else min(reach + 1, added.shape[1])
    while span < reach:
        # Position t now holds the last `span` tokens up to t as one step; prepend the `span` before those.
        added = torch.cat([added[:, :span], added[:, span:] + keep[:, span:, None] * added[:, :-span]], dim=1)
        keep = torch.cat([keep[:, :span], keep[:, span:] * keep[:, :-span]], dim=1)
        span *= 2
    return added if start is None else added + keep.unsqueeze(-1) * start.unsqueeze(1)


class EvidenceLayer(DynamicLayer, DummyLayer):
    """The evidence of past tokens, as one more layer of a key-value cache.

    Being a layer, it follows beam reordering, cropping, batch selection and reset with no help. It keeps every past
    token's evidence (F numbers) as keys (B, 1, P, F) and values of width 0. It is a `DummyLayer` too, which is how a
    cache tells layers without attention: masks are never sized by it, offloading passes it by.
    """

    supports_early_init = False
    # A cache that compiles (static) still must after this layer joins it: masks are built differently for it.
    is_compileable = True
    is_croppable = True

    def __init__(self) -> None:
        DynamicLayer.__init__(self)


def evidence_history(cache: Cache) -> Tensor | None:
    """The evidence of the tokens in `cache`, (B, P, F), for `ReceptiveFields.forward`; None when it holds none."""
    layer = _evidence_layer(cache)
    return None if layer is None or layer.keys is None or layer.keys.shape[-2] == 0 else layer.keys.squeeze(1)


def remember(cache: Cache, evidence: Tensor) -> None:
    """Append a pass's evidence (B, T, F) to `cache`.

    Call it after the backbone's forward: caches that create layers lazily number them by position, so ours must come
    last. A cache without layers has cached nothing and is left alone.
    """
    layer = _evidence_layer(cache)
    if layer is None:
        if not cache.layers:
            return
        layer = EvidenceLayer()
        cache.layers.append(layer)
    keys = evidence.unsqueeze(1)
    layer.update(keys, keys[..., :0])


def _evidence_layer(cache: Cache) -> EvidenceLayer | None:
    return next((layer for layer in reversed(cache.layers) if isinstance(layer, EvidenceLayer)), None)


__all__ = ["EvidenceLayer", "evidence_history", "linear_recurrence", "remember"]
