"""Receptive fields: which field each token is in, decided from the tokens up to it.

A field is a density over tokens. Field 0, the root, has the density of what the source model knew (counted once, by
`calibrate`); fields 1..F are newborn, start as the root's density and depart from it as they count the training stream.
The evidence for field f at token t is the exponential running mean of the log likelihood ratio,

    r_t = log p_f(x_t) - log p_0(x_t),        e_t = decay * e_{t-1} + (1 - decay) * r_t,        e_{-1} = 0,

and the token is in the field whose evidence exceeds its threshold most, or in the root when none does. Token t is an
input when token t + 1 is predicted, so the gate is causal: no future, no label. The threshold is the larger of 0 (a
fair comparison; with no evidence everything stays in the root) and a quantile of the same evidence on a sample of the
calibration text, which bounds the share of old tokens that leave the root.

Comparing densities instead of testing for novelty is what separates near domains (see docs/design.md). The root's
density is smoothed as Witten & Bell 1991 (IEEE Trans. Inf. Theory 37(4)), a newborn's by a Dirichlet prior.

B sequences, T tokens of this pass, P tokens before it, V vocabulary, F newborn fields, N calibration ids. The module
must not touch hidden states, gradients, or the experts of a field; all its state is integer counts and ids.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer
from transformers.utils import logging

from living_moe.configuration.errors import LivingMoeError
from living_moe.configuration.sections import ReceptiveFieldConfig

logger = logging.get_logger(__name__)

#: Stands in `calibration_ids` where one window ends; evidence starts again at 0 after it.
BOUNDARY = -1
#: Longest window, in tokens, cut from calibration text: many times the gate's memory, so its start weighs little.
WINDOW = 512
#: Counts enter the densities in use when they would enlarge them by this share. Early counts, which change a density
#: most, enter at once; later the tables and the threshold are placed again only now and then.
REFRESH_GROWTH = 0.1


@dataclasses.dataclass
class FieldGate:
    """The field of each token of one forward pass.

    Attributes:
        index: int64 (B, T); 0 is the root field, 1..F a newborn field.
        evidence: (B, T, F), the running mean after each token: what a cache must remember. A padding token carries its
            predecessor's.
    """

    index: Tensor
    evidence: Tensor
    _any_open: bool | None = None

    def any_open(self) -> bool:
        """Whether some token is outside the root field; reads the device once and remembers the answer.

        Always True in a graph being compiled or exported, which a branch on the data would break.
        """
        if torch.compiler.is_compiling():
            return True
        if self._any_open is None:
            self._any_open = bool((self.index > 0).any())
        return self._any_open

    def to(self, device: torch.device | str) -> FieldGate:
        """The same gate on another device (itself when it is already there)."""
        if self.index.device == torch.device(device):
            return self
        return FieldGate(self.index.to(device), self.evidence.to(device), self._any_open)


@dataclasses.dataclass
class _Tables:
    """What follows from the counts, on the device of the counts."""

    calibrated: bool
    log_ratio: Tensor  # (V, F)
    threshold: Tensor  # (F,)


class ReceptiveFields(nn.Module):
    """Densities of the root field and F newborn fields, and the causal gate between them.

    Until `calibrate` has told it the root's density the gate cannot compare: every token is in field 1 (open), with one
    warning. State, all of it integers (so exact in any dtype, and in the state dict); tables and thresholds are a pure
    function of it, computed when first needed:

        old_counts       (V,)    int64   tokens of the calibration text
        new_counts       (F, V)  int64   tokens counted into the densities in use
        waiting_counts   (F, V)  int64   tokens counted since (see REFRESH_GROWTH)
        calibration_ids  (N,)    int32   windows of calibration text, each followed by BOUNDARY
        calibrated       ()      bool

    Args:
        config: decay, quantile, prior and size of the calibration sample.
        vocab_size: V.
        num_fields: F, newborn fields.
    """

    old_counts: Tensor
    new_counts: Tensor
    waiting_counts: Tensor
    calibration_ids: Tensor
    calibrated: Tensor

    def __init__(self, config: ReceptiveFieldConfig, vocab_size: int, num_fields: int = 1) -> None:
        super().__init__()
        self.decay = config.decay
        self.quantile = config.quantile
        self.prior_tokens = config.prior_tokens
        self.vocab_size = vocab_size
        self.num_fields = num_fields
        self.register_buffer("old_counts", torch.zeros(vocab_size, dtype=torch.int64))
        self.register_buffer("new_counts", torch.zeros(num_fields, vocab_size, dtype=torch.int64))
        self.register_buffer("waiting_counts", torch.zeros(num_fields, vocab_size, dtype=torch.int64))
        ids = torch.full((config.calibration_tokens,), BOUNDARY, dtype=torch.int32)
        self.register_buffer("calibration_ids", ids)
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))
        # Not a buffer: DDP would overwrite every rank's own counts by those of rank 0.
        self._pending: Tensor | None = None
        self._tables: _Tables | None = None

    def reset_parameters(self) -> None:
        """Empty state, for models built on the meta device; leaves alone what a checkpoint has loaded."""
        for counts in (self.old_counts, self.new_counts, self.waiting_counts):
            init.zeros_(counts)
        init.constant_(self.calibration_ids, BOUNDARY)
        init.zeros_(self.calibrated)
        self._tables = None

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        history: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> FieldGate:
        """The field of each token.

        Args:
            input_ids: int (B, T). An id outside [0, V) says nothing (ratio 0): pass -1 for tokens given as embeddings.
            mask: (B, T), zero or False for padding, which neither adds evidence nor lets it decay; None is no padding.
            history: (B, P, F), the evidence of the tokens before these (`evidence_history`); None when these are the
                first.
            position_ids: int (B, T) or (1, T). A token at position 0 begins a text of its own (texts packed into one
                row), so no evidence reaches it from before; None is one text per row.

        Returns:
            The gate, on the device of the counts. Token by token, chunk by chunk and all at once give the same evidence
            up to rounding (float64; float32 where the device has no float64).
        """
        tables = self._current_tables()
        device, dtype = tables.threshold.device, tables.threshold.dtype
        ids = input_ids.to(device)
        if not tables.calibrated:
            logger.warning_once(
                "The receptive fields of this model are not calibrated: what it knew before is unknown, so every token "
                "is taken for new text and nothing is protected. Call `model.calibrate(token_ids)` with text of the "
                "domain the model already knows."
            )
            evidence = torch.zeros(*ids.shape, self.num_fields, dtype=dtype, device=device)
            return FieldGate(torch.ones_like(ids, dtype=torch.int64), evidence, ids.numel() > 0)
        keep = torch.full(ids.shape, self.decay, dtype=dtype, device=device)
        added = self._ratios(ids, tables.log_ratio) * (1 - self.decay)
        if position_ids is not None:
            keep = torch.where(position_ids.to(device) == 0, 0.0, keep)
        if mask is not None:
            real = mask.to(device).bool()
            keep = torch.where(real, keep, 1.0)
            added = torch.where(real.unsqueeze(-1), added, 0.0)
        start = None if history is None or history.shape[1] == 0 else history[:, -1].to(device, dtype)
        evidence = linear_recurrence(keep, added, start)
        margin, field = (evidence - tables.threshold).max(dim=-1)
        return FieldGate(torch.where(margin > 0, field + 1, 0), evidence)

    @property
    def threshold(self) -> Tensor:
        """Evidence above which each newborn field opens, in nats per token, (F,), never below 0."""
        return self._current_tables().threshold

    def observe(self, input_ids: Tensor, mask: Tensor | None = None, field: int = 1) -> None:
        """Count tokens into a newborn field; they take effect when `fold` is given them.

        Args:
            input_ids: int, any shape. Ids outside [0, V) are not counted.
            mask: Same shape, zero or False for tokens not to count.
            field: 1..F.
        """
        counts = self.pending_counts()
        ids = input_ids.reshape(-1).to(counts.device, torch.int64)
        known = (ids >= 0) & (ids < self.vocab_size)
        if mask is not None:
            known = known & mask.reshape(-1).to(counts.device).bool()
        counts[field - 1].scatter_add_(0, torch.where(known, ids, 0), known.to(torch.int64))

    def pending_counts(self) -> Tensor:
        """Counts observed since the last `fold`, int64 (F, V): the tensor itself, to be summed over ranks in place."""
        device = self.new_counts.device
        if self._pending is None:
            self._pending = torch.zeros(self.num_fields, self.vocab_size, dtype=torch.int64, device=device)
        self._pending = self._pending.to(device)
        return self._pending

    @torch.no_grad()
    def fold(self, counts: Tensor) -> None:
        """Take counts into the newborn densities and start observing anew.

        Args:
            counts: int64 (F, V), `pending_counts()` summed over all ranks; the same on every rank.
        """
        self.waiting_counts += counts
        self._pending = None
        in_use = self.new_counts.sum(dim=-1) + self.prior_tokens
        if (self.waiting_counts.sum(dim=-1) > REFRESH_GROWTH * in_use).any():
            self.new_counts += self.waiting_counts
            self.waiting_counts.zero_()
            self._tables = None

    @torch.no_grad()
    def calibrate(self, token_ids: Tensor) -> None:
        """Learn the root's density from text of the domain the model already knows; replaces what was there.

        All of the text is counted. A sample of it is kept in the model, to place thresholds again as newborn densities
        grow; it is never trained on. Longer text is sampled evenly, in windows of contiguous tokens.

        Args:
            token_ids: int (tokens,) or (documents, tokens), without padding.

        Raises:
            LivingMoeError: The text is empty, not integers, not of 1 or 2 dimensions, or has ids outside [0, V).
        """
        if token_ids.dim() not in (1, 2) or token_ids.is_floating_point() or token_ids.dtype == torch.bool:
            raise LivingMoeError(
                "calibration text must be token ids (integers) of shape (tokens,) or (documents, tokens), got shape "
                f"{tuple(token_ids.shape)} and dtype {token_ids.dtype}; tokenize it first."
            )
        if token_ids.numel() == 0:
            raise LivingMoeError("calibration text is empty; give at least a few thousand tokens of the old domain.")
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= self.vocab_size:
            raise LivingMoeError(
                f"calibration ids must be in [0, {self.vocab_size}), got {low}..{high}; use the model's own tokenizer "
                "and leave out padding."
            )
        device = self.old_counts.device
        documents = token_ids.reshape(-1, token_ids.shape[-1]).to(device, torch.int64)
        self.old_counts = torch.bincount(documents.reshape(-1), minlength=self.vocab_size)
        self.calibration_ids = self._sample_windows(documents)
        self.calibrated = torch.ones((), dtype=torch.bool, device=device)
        self._tables = None

    @torch.no_grad()
    def resize_vocab(self, new_size: int) -> None:
        """Follow a resized embedding: new tokens have been seen by no field, removed ones are forgotten.

        Args:
            new_size: V from now on.
        """
        kept = min(new_size, self.vocab_size)
        for name in ("old_counts", "new_counts", "waiting_counts", "_pending"):
            counts = getattr(self, name)
            if counts is not None:
                resized = counts.new_zeros(*counts.shape[:-1], new_size)
                resized[..., :kept] = counts[..., :kept]
                setattr(self, name, resized)
        self.calibration_ids = torch.where(self.calibration_ids < new_size, self.calibration_ids, BOUNDARY)
        self.vocab_size = new_size
        self._tables = None

    def extra_repr(self) -> str:
        return f"vocab_size={self.vocab_size}, num_fields={self.num_fields}, decay={self.decay}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._tables = None

    def _sample_windows(self, documents: Tensor) -> Tensor:
        budget = self.calibration_ids.shape[0]
        length = min(WINDOW, documents.shape[1], budget)
        per_document = documents.shape[1] // length
        total = documents.shape[0] * per_document
        number = min(total, (budget + 1) // (length + 1))
        # Whole windows, evenly spread over the text: the first and the last among them.
        chosen = torch.linspace(0, total - 1, number, dtype=torch.float64, device=documents.device).round().long()
        starts = chosen % per_document * length
        columns = starts.unsqueeze(-1) + torch.arange(length, device=documents.device)
        windows = documents[(chosen // per_document).unsqueeze(-1), columns]
        ended = torch.nn.functional.pad(windows, (0, 1), value=BOUNDARY).reshape(-1)[:budget]
        return torch.nn.functional.pad(ended, (0, budget - ended.shape[0]), value=BOUNDARY).to(torch.int32)

    def _ratios(self, ids: Tensor, log_ratio: Tensor) -> Tensor:
        known = (ids >= 0) & (ids < self.vocab_size)
        return torch.where(known.unsqueeze(-1), log_ratio[torch.where(known, ids, 0).long()], 0.0)

    @torch.no_grad()
    def _current_tables(self) -> _Tables:
        tables, device = self._tables, self.new_counts.device
        if tables is None or tables.threshold.device != device:
            tables = self._tables = self._compute_tables()
        return tables

    def _compute_tables(self) -> _Tables:
        device = self.new_counts.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        closed = torch.zeros(self.num_fields, dtype=dtype, device=device)
        if not self.calibrated:
            return _Tables(False, torch.zeros(self.vocab_size, self.num_fields, dtype=dtype, device=device), closed)
        old = self.old_counts.to(dtype)
        # Witten-Bell: the mass set aside for unseen tokens follows how often a new one turned up in this text.
        types = (old > 0).sum()
        p_old = (old + types / self.vocab_size) / (old.sum() + types)
        new = self.new_counts.to(dtype)
        # log of ((new + prior * p_old) / (tokens + prior)) / p_old, written so that an empty field gives exactly 0.
        ratio = (new / p_old + self.prior_tokens) / (new.sum(dim=-1, keepdim=True) + self.prior_tokens)
        log_ratio = ratio.log().T.contiguous()

        ids = self.calibration_ids
        real = ids != BOUNDARY
        keep = torch.where(real, self.decay, 0.0).to(dtype)
        added = self._ratios(ids, log_ratio) * (1 - self.decay)
        evidence = linear_recurrence(keep.unsqueeze(0), added.unsqueeze(0), reach=WINDOW).squeeze(0)[real]
        number = evidence.shape[0]
        highest = evidence.topk(number - math.ceil(self.quantile * number) + 1, dim=0).values
        # Between two neighbours, so that no calibration token sits on the threshold and falls by rounding.
        threshold = (highest[-1] + highest[max(highest.shape[0] - 2, 0)]) / 2
        return _Tables(True, log_ratio, threshold.clamp_min(0.0))


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


def remember(cache: Cache, gate: FieldGate) -> None:
    """Append a pass's evidence to `cache`.

    Call it after the backbone's forward: caches that create layers lazily number them by position, so ours must come
    last. A cache without layers has cached nothing and is left alone.
    """
    layer = _evidence_layer(cache)
    if layer is None:
        if not cache.layers:
            return
        layer = EvidenceLayer()
        cache.layers.append(layer)
    keys = gate.evidence.unsqueeze(1)
    layer.update(keys, keys[..., :0])


def _evidence_layer(cache: Cache) -> EvidenceLayer | None:
    last = cache.layers[-1] if cache.layers else None
    return last if isinstance(last, EvidenceLayer) else None


__all__ = ["EvidenceLayer", "FieldGate", "ReceptiveFields", "evidence_history", "linear_recurrence", "remember"]
