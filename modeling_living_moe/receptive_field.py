"""Receptive fields: which field each token is in, decided from the tokens up to it, and when a field is born.

A field is a density over tokens. Field 0, the root, has the density of what the source model knew (counted once, by
`calibrate`); fields 1..F are newborn, start as the root's density and depart from it as they count training text. The
evidence for field f at token t is the exponential running mean of the log likelihood ratio,

    r_t = log p_f(x_t) - log p_0(x_t),        e_t = decay * e_{t-1} + (1 - decay) * r_t,        e_{-1} = 0,

with e = 0 for the root. Every token starts in the root, and the fields are asked in the order of their birth: a field
takes the token from the one that has it when its evidence is the larger by more than a threshold. That is the larger
of 0 (a fair comparison; with no evidence everything stays in the root) and a quantile of the same difference on a
sample of the older field's own text, which bounds the share of that text's tokens a younger field may take. Token t is
an input when token t + 1 is predicted, so the gate is causal: no future, no label.

In training each piece of text belongs to one field, whose density counts it. A field explains a piece when the piece
is no likelier to surprise it than its own text is (within `novelty` standard deviations); it belongs to the likeliest
field that explains it. What nobody explains, or what the last field makes likelier than all others do, belongs to the
last field. That one sleeps at first: it counts, and serves nobody, until it would take much of the stream that belongs
to it; then it wakes. Meanwhile others learn what they explain as well, and the outliers of their own domain: pieces
not much stranger than what they explain, as long as such are few. After `field_tokens` tokens it is mature, and another
may be born (`wants_another`). So a domain that returns goes to the field that knows it, and labels are never needed.
Tokens that the gate puts into another newborn field than the one their text belongs to are trained in the root, where
nothing is learned: no field learns another's text.

Comparing densities instead of testing for novelty alone is what separates near domains (see docs/design.md). The root's
density is smoothed as Witten & Bell 1991 (IEEE Trans. Inf. Theory 37(4)), a newborn's by a Dirichlet prior.

B sequences, T tokens of this pass, P tokens before it, V vocabulary, F newborn fields, N calibration ids, S sampled
pieces, L length of a piece (PIECE), M pieces of a batch. The module must not touch hidden states, gradients, or the
experts of a field; all its state is integer counts and ids.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import logging

from living_moe.configuration.errors import LivingMoeError
from living_moe.configuration.sections import ReceptiveFieldConfig
from living_moe.modeling_living_moe.distributed import rank, world_size
from living_moe.modeling_living_moe.field_evidence import linear_recurrence

logger = logging.get_logger(__name__)

#: Stands in samples of text where a piece ends; evidence starts again at 0 after it.
BOUNDARY = -1
#: Longest window, in tokens, cut from calibration text: many times the gate's memory, so its start weighs little.
WINDOW = 512
#: Tokens of a text that are assigned to a field together while training.
PIECE = 128
#: Pieces kept per newborn field to place the thresholds of younger ones, and how many a step may add.
SAMPLED_PIECES, PIECES_PER_STEP = 128, 8
#: Nats per token.
LEAST_DEVIATION = 0.01
#: A field whose own text is known from fewer pieces than this explains everything.
FEWEST_PIECES = 8
#: Nats per token by which the last field may be the worse and still count a piece: it starts as a copy of the root.
TIE = 0.02
#: The last field wakes when it would take this share of the tokens that belong to it, and these are that share of all.
WAKING_SHARE, STREAM_SHARE = 0.25, 0.2
#: While less of the stream belonged to a sleeping field at the last step, what is new is the outliers of another.
NEWS_SHARE = 0.5
#: Unless it is this many times further from all others than what they explain.
FAR = 2.0
#: Tokens the first field must have counted before it wakes; later ones the prior's.
FIRST_WAKING = 2 * PIECE
#: Tokens over which those shares are taken.
RECENT = 16384
#: A sleeping field's counts are halved above this multiple of the prior, so that it follows what is new by now.
SLEEPER_PRIORS = 4
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
    _present: tuple[int, ...] | None = None

    @property
    def present(self) -> tuple[int, ...]:
        """Newborn fields with tokens here, ascending; reads the device once and remembers the answer.

        All of them in a graph being compiled or exported, which a branch on the data would break.
        """
        if torch.compiler.is_compiling():
            return tuple(range(1, self.evidence.shape[-1] + 1))
        if self._present is None:
            self._present = tuple(field for field in self.index.unique().tolist() if field > 0)
        return self._present

    def any_open(self) -> bool:
        """Whether some token is outside the root field."""
        return bool(self.present)

    def to(self, device: torch.device | str) -> FieldGate:
        """The same gate on another device (itself when it is already there)."""
        if self.index.device == torch.device(device):
            return self
        return FieldGate(self.index.to(device), self.evidence.to(device), self._present)


@dataclasses.dataclass
class _Tables:
    """What follows from the state, on its device."""

    calibrated: bool
    log_root: Tensor  # (V,)
    log_ratio: Tensor  # (V, F)
    threshold: Tensor  # (F, F): row f - 1 is what field f must exceed each older field by, the root first
    mean: Tensor  # (F + 1,) nats per token of a field's own text under its density, root first
    deviation: Tensor  # (F + 1,) of that mean over pieces of PIECE tokens; inf where too few are known
    awake: tuple[bool, ...]  # (F,)


@dataclasses.dataclass
class _Pieces:
    """The pieces of a batch: (B * T,) which one each token is in, and per piece the sums over its M tokens."""

    of_token: Tensor
    first: Tensor  # (M,) flat position of the first token
    length: Tensor  # (M,) tokens that count
    log_root: Tensor  # (M,)
    log_ratio: Tensor  # (M, F)


class ReceptiveFields(nn.Module):
    """Densities of the root field and F newborn fields, and the causal gate between them.

    Until `calibrate` has told it the root's density the gate cannot compare: every token is in the last field (open),
    with one warning. State, all of it integers (so exact in any dtype, and in the state dict); tables and thresholds
    are a pure function of it, computed when first needed:

        old_counts       (V,)       int64   tokens of the calibration text
        new_counts       (F, V)     int64   tokens counted into the densities in use
        waiting_counts   (F, V)     int64   tokens counted since (see REFRESH_GROWTH)
        calibration_ids  (N,)       int32   windows of calibration text, each followed by BOUNDARY
        calibrated       ()         bool
        sample_ids       (F, S, L)  int32   pieces of each newborn field's own text, filled up with BOUNDARY
        sampled          (F,)       int64   pieces that were candidates for the sample
        awake            (F,)       bool
        recent           (3,)       int64   of about RECENT tokens: all, the last field's, those it would take
        latest           (2,)       int64   the first two of those at the last `fold` that brought tokens

    Args:
        config: decay, quantile, prior, novelty, and sizes.
        vocab_size: V.
        num_fields: F, newborn fields.
    """

    old_counts: Tensor
    new_counts: Tensor
    waiting_counts: Tensor
    calibration_ids: Tensor
    calibrated: Tensor
    sample_ids: Tensor
    sampled: Tensor
    awake: Tensor
    recent: Tensor
    latest: Tensor

    def __init__(self, config: ReceptiveFieldConfig, vocab_size: int, num_fields: int = 1) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        #: Changes whenever a field is born.
        self.version = 0
        self.register_buffer("old_counts", torch.zeros(vocab_size, dtype=torch.int64))
        self.register_buffer("new_counts", torch.zeros(num_fields, vocab_size, dtype=torch.int64))
        self.register_buffer("waiting_counts", torch.zeros(num_fields, vocab_size, dtype=torch.int64))
        ids = torch.full((config.calibration_tokens,), BOUNDARY, dtype=torch.int32)
        self.register_buffer("calibration_ids", ids)
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))
        ids = torch.full((num_fields, SAMPLED_PIECES, PIECE), BOUNDARY, dtype=torch.int32)
        self.register_buffer("sample_ids", ids)
        self.register_buffer("sampled", torch.zeros(num_fields, dtype=torch.int64))
        self.register_buffer("awake", torch.zeros(num_fields, dtype=torch.bool))
        self.register_buffer("recent", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("latest", torch.zeros(2, dtype=torch.int64))
        # Not buffers: DDP would overwrite every rank's own counts by those of rank 0.
        self._pending: Tensor | None = None
        #: Tokens each newborn field was trained on since the optimizer last asked, int64 (F,).
        self.since_step: Tensor | None = None
        self._tables: _Tables | None = None

    @property
    def num_fields(self) -> int:
        """F."""
        return int(self.new_counts.shape[0])

    def reset_parameters(self) -> None:
        """Empty state, for models built on the meta device; leaves alone what a checkpoint has loaded."""
        for counts in (self.old_counts, self.new_counts, self.waiting_counts, self.sampled, self.recent, self.latest):
            init.zeros_(counts)
        for ids in (self.calibration_ids, self.sample_ids):
            init.constant_(ids, BOUNDARY)
        init.zeros_(self.calibrated)
        init.zeros_(self.awake)
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
            index = torch.full_like(ids, self.num_fields, dtype=torch.int64)
            return FieldGate(index, evidence, (self.num_fields,) if ids.numel() else ())
        keep = torch.full(ids.shape, self.config.decay, dtype=dtype, device=device)
        added = self._ratios(ids, tables.log_ratio) * (1 - self.config.decay)
        if position_ids is not None:
            keep = torch.where(position_ids.to(device) == 0, 0.0, keep)
        if mask is not None:
            real = mask.to(device).bool()
            keep = torch.where(real, keep, 1.0)
            added = torch.where(real.unsqueeze(-1), added, 0.0)
        start = None if history is None or history.shape[1] == 0 else history[:, -1].to(device, dtype)
        evidence = linear_recurrence(keep, added, start)
        return FieldGate(taken_by(evidence, tables.threshold, tables.awake), evidence)

    @property
    def threshold(self) -> Tensor:
        """Nats per token by which each newborn field's evidence must exceed the root's, (F,), never below 0."""
        return self._current_tables().threshold[:, 0]

    # -- training ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(
        self,
        input_ids: Tensor,
        mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        gate: FieldGate | None = None,
    ) -> Tensor:
        """Find out which field each text belongs to, and count it there; counts take effect at the next `fold`.

        Args:
            input_ids: int (B, T). Ids outside [0, V) are not counted.
            mask: (B, T), zero or False for tokens not to count.
            position_ids: As for `forward`.
            gate: What `forward` said of these tokens, if it was asked already.

        Returns:
            int64 (B, T), the field each token's text belongs to.
        """
        tables = self._current_tables()
        device = tables.threshold.device
        ids = input_ids.to(device, torch.int64)
        known = (ids >= 0) & (ids < self.vocab_size)
        if mask is not None:
            known = known & mask.to(device).bool()
        safe = torch.where(known, ids, 0)
        last = self.num_fields
        if tables.calibrated:
            pieces = self._pieces(tables, safe, known, position_ids)
            home_M, nearest_M = self._homes(tables, pieces)
            belongs = home_M[pieces.of_token].view(ids.shape)
            self._sample(pieces, home_M, ids, known)
        else:
            belongs = torch.full_like(ids, last)
        counts, recent, _ = self._parts(self.pending())
        count_into(counts, belongs, safe, known)
        if tables.calibrated:
            gate = self(input_ids, mask, position_ids=position_ids) if gate is None else gate
            mine = known & (belongs == last)
            everyone = (*tables.awake[:-1], True)
            taken = taken_by(gate.evidence, tables.threshold, everyone) == last
            recent += torch.stack([known.sum(), mine.sum(), (mine & taken).sum()])
            if not tables.awake[-1]:
                # While it sleeps nothing is learned in it: the nearest learns it meanwhile.
                nearest = nearest_M[pieces.of_token].view(ids.shape)
                lent = mine & (nearest != last)
                belongs = torch.where(lent, nearest, belongs)
                count_into(counts, torch.where(lent, nearest, 0), safe, known)
        return belongs

    def trained_gate(self, gate: FieldGate, belongs: Tensor, mask: Tensor | None) -> FieldGate:
        """The gate a training pass uses: no field learns from text that belongs to another."""
        trained = gate
        if self._current_tables().calibrated:
            trained = FieldGate(torch.where(gate.index == belongs, gate.index, 0), gate.evidence)
        index = trained.index if mask is None else trained.index[mask.to(trained.index.device).bool()]
        counts = torch.bincount(index.flatten(), minlength=self.num_fields + 1)[1:]
        self.since_step = counts if self.since_step is None else self.since_step + counts
        return trained

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        if self.since_step is not None:
            self.since_step = self.since_step.to(self.new_counts.device)
        return self

    def pending(self) -> Tensor:
        """What was observed since the last `fold`: int64, the tensor itself, to be summed over ranks in place."""
        device, sizes = self.new_counts.device, self._sizes()
        if self._pending is None:
            self._pending = torch.zeros(sum(math.prod(size) for size in sizes), dtype=torch.int64, device=device)
        self._pending = self._pending.to(device)
        return self._pending

    def _sizes(self) -> list[tuple[int, ...]]:
        sampled = (self.num_fields, world_size() * PIECES_PER_STEP, PIECE)
        return [(self.num_fields, self.vocab_size), (3,), sampled]

    def _parts(self, pending: Tensor) -> list[Tensor]:
        """Counts (F, V), what goes into `recent` (3,), and sampled ids plus one (F, ranks * PIECES_PER_STEP, L)."""
        sizes = self._sizes()
        parts = pending.split([math.prod(size) for size in sizes])
        return [part.view(size) for part, size in zip(parts, sizes, strict=True)]

    @torch.no_grad()
    def fold(self, pending: Tensor) -> None:
        """Take what was observed into the state, wake the last field if it is time, and start observing anew.

        Args:
            pending: `pending()`, summed over all ranks; the same on every rank.
        """
        counts, recent, sampled = self._parts(pending)
        self.waiting_counts += counts
        self.recent += recent
        shrunk = self.recent * RECENT // self.recent[0].clamp_min(1)
        self.recent.copy_(torch.where(self.recent[0] > RECENT, shrunk, self.recent))
        self.latest.copy_(torch.where(recent[0] > 0, recent[:2], self.latest))
        self._keep_samples(sampled)
        self._pending = None
        in_use = self.new_counts.sum(dim=-1) + self.config.prior_tokens
        waiting = self.waiting_counts.sum(dim=-1)
        total = (self.new_counts + self.waiting_counts)[-1].sum()
        everyone, mine, taken = self.recent.unbind()
        # Until the first field wakes nothing at all is learned.
        least = FIRST_WAKING if self.num_fields == 1 else self.config.prior_tokens
        wakes = ~self.awake[-1] & (total >= least) & (taken > WAKING_SHARE * mine) & (mine > STREAM_SHARE * everyone)
        drowsy = self.calibrated & ~self.awake[-1] & ~wakes & (total > SLEEPER_PRIORS * self.config.prior_tokens)
        refresh, wakes_now, halve = torch.stack([(waiting > REFRESH_GROWTH * in_use).any(), wakes, drowsy]).tolist()
        if refresh or halve:
            self.new_counts += self.waiting_counts
            self.waiting_counts.zero_()
        if halve:
            self.new_counts[-1] //= 2
            self.sampled[-1] //= 2
        if wakes_now:
            self.awake[-1] = True
        if refresh or halve or wakes_now:
            self._tables = None

    def wants_another(self) -> bool:
        """Whether the last field is mature, and a next one may be born."""
        if self.num_fields >= self.config.max_fields or not self._current_tables().awake[-1]:
            return False
        return int(self.num_tokens()[-1]) >= self.config.field_tokens

    def num_tokens(self) -> Tensor:
        """Tokens each newborn field has counted, int64 (F,)."""
        return (self.new_counts + self.waiting_counts).sum(dim=-1)

    @torch.no_grad()
    def resize_fields(self, num_fields: int) -> None:
        """Append sleeping fields that have seen nothing, or drop the last ones."""
        for name in ("new_counts", "waiting_counts", "sample_ids", "sampled", "awake"):
            old: Tensor = getattr(self, name)
            fill = BOUNDARY if name == "sample_ids" else 0
            new = old.new_full((num_fields, *old.shape[1:]), fill)
            kept = min(num_fields, len(old))
            new[:kept] = old[:kept]
            setattr(self, name, new)
        self.recent, self.latest = torch.zeros_like(self.recent), torch.zeros_like(self.latest)
        self._pending = self.since_step = self._tables = None
        self.version += 1

    # -- text assigned to fields ---------------------------------------------------------------------------------------

    def _pieces(self, tables: _Tables, ids: Tensor, known: Tensor, position_ids: Tensor | None) -> _Pieces:
        length = ids.shape[-1]
        position = torch.arange(length, device=ids.device) if position_ids is None else position_ids.to(ids.device)
        begins = (position % PIECE == 0).expand(ids.shape).clone()
        begins[..., 0] = True
        of_token = begins.view(-1).cumsum(0) - 1
        first = begins.view(-1).nonzero()[:, 0]
        count = known.view(-1).to(tables.log_root.dtype)

        def summed(values: Tensor) -> Tensor:
            result = values.new_zeros(len(first), *values.shape[1:])
            return result.index_add_(0, of_token, values)

        flat = ids.reshape(-1)
        return _Pieces(
            of_token,
            first,
            summed(count),
            summed(tables.log_root[flat] * count),
            summed(tables.log_ratio[flat] * count.unsqueeze(-1)),
        )

    def _homes(self, tables: _Tables, pieces: _Pieces) -> tuple[Tensor, Tensor]:
        """The field of each piece (M,), and the other that may learn it meanwhile (M,), the last where none may."""
        last = self.num_fields
        length = pieces.length.clamp_min(1.0)
        ratio = torch.cat([pieces.log_ratio.new_zeros(len(length), 1), pieces.log_ratio], dim=1) / length.unsqueeze(-1)
        surprise = (pieces.log_root / length).unsqueeze(-1) + ratio - tables.mean
        score = surprise / tables.deviation * (length.unsqueeze(-1) / PIECE).sqrt()
        explains = score >= -self.config.novelty
        if (
            last == self.config.max_fields
            and tables.awake[-1]
            and int(self.num_tokens()[-1]) >= self.config.field_tokens
        ):
            # Nobody is left to take what is new.
            none = ~explains.any(dim=1, keepdim=True)
            home = ratio.masked_fill(~explains & ~none, -math.inf).argmax(dim=1)
            return home, home
        best, home = ratio[:, :last].masked_fill(~explains[:, :last], -math.inf).max(dim=1)
        novel = best == -math.inf
        gain = ratio[:, last] - ratio[:, :last].amax(dim=1)
        # Few strange pieces are the outliers of their domain, many are news. Which they are, the last step says: this
        # pass may see only a part of the batch, another rank the rest.
        familiar = self.latest[1] < NEWS_SHARE * self.latest[0]
        near = score[:, :last] >= -FAR * self.config.novelty
        likeliest, nearest = ratio[:, :last].masked_fill(~near, -math.inf).max(dim=1)
        nearest = torch.where(novel & (~familiar | (likeliest == -math.inf)), last, torch.where(novel, nearest, home))
        return torch.where(novel | (gain > -TIE), last, home), nearest

    def _sample(self, pieces: _Pieces, home_M: Tensor, ids: Tensor, known: Tensor) -> None:
        """Offer some pieces of each newborn field for its sample."""
        sampled = self._parts(self.pending())[2]
        mine = slice(rank() * PIECES_PER_STEP, (rank() + 1) * PIECES_PER_STEP)
        length = ids.shape[-1]
        flat = torch.where(known, ids, BOUNDARY).reshape(-1)
        offset = torch.arange(PIECE, device=ids.device)
        for field in range(1, self.num_fields + 1):
            # The longest, the first of them: a stable order, so that every device chooses alike.
            size = torch.where(home_M == field, pieces.length, 0.0)
            chosen = size.sort(descending=True, stable=True)[1][:PIECES_PER_STEP]
            place = pieces.first[chosen].unsqueeze(-1) + offset
            inside = place < (pieces.first[chosen] // length * length + length).unsqueeze(-1)
            place = place.clamp_max(len(flat) - 1)
            inside &= (pieces.of_token[place] == chosen.unsqueeze(-1)) & (size[chosen] > 0).unsqueeze(-1)
            new = torch.where(inside, flat[place], BOUNDARY) + 1
            room = sampled[field - 1, mine]
            room[: len(new)] = torch.where((room[: len(new)] > 0).any(dim=-1, keepdim=True), room[: len(new)], new)

    def _keep_samples(self, sampled: Tensor) -> None:
        """Reservoir sampling (Vitter 1985, ACM TOMS 11(1)), with a hash of the running number for randomness."""
        for field, pieces in enumerate(sampled - 1):
            real = (pieces != BOUNDARY).any(dim=-1)
            number = self.sampled[field] + real.cumsum(0) - 1
            hashed = _hashed(number + 1_000_003 * field)
            slot = torch.where(number < SAMPLED_PIECES, number, hashed % (number + 1).clamp_min(1))
            # Two pieces may draw one place: the later has it, on every device alike.
            order = torch.arange(1, len(slot) + 1, device=slot.device)
            winner = torch.zeros(SAMPLED_PIECES + 1, dtype=torch.int64, device=slot.device)
            winner.scatter_reduce_(0, torch.where(real & (slot < SAMPLED_PIECES), slot, SAMPLED_PIECES), order, "amax")
            winner = winner[:SAMPLED_PIECES].unsqueeze(-1)
            drawn = pieces[(winner[:, 0] - 1).clamp_min(0)].to(self.sample_ids.dtype)
            self.sample_ids[field] = torch.where(winner > 0, drawn, self.sample_ids[field])
            self.sampled[field] += real.sum()

    # -- what it compares with -----------------------------------------------------------------------------------------

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
        counts, recent, sampled = self._parts(self.pending())
        for name in ("old_counts", "new_counts", "waiting_counts"):
            setattr(self, name, _resized(getattr(self, name), new_size, kept))
        # Pending pieces hold ids plus one.
        sampled = torch.where(sampled <= new_size, sampled, 0)
        self._pending = torch.cat([_resized(counts, new_size, kept).flatten(), recent, sampled.flatten()])
        self.calibration_ids = torch.where(self.calibration_ids < new_size, self.calibration_ids, BOUNDARY)
        self.sample_ids = torch.where(self.sample_ids < new_size, self.sample_ids, BOUNDARY)
        self.vocab_size = new_size
        self._tables = None

    def extra_repr(self) -> str:
        return f"vocab_size={self.vocab_size}, num_fields={self.num_fields}, decay={self.config.decay}"

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
        device, count = self.new_counts.device, self.num_fields
        dtype = torch.float32 if device.type == "mps" else torch.float64
        awake = tuple(self.awake.tolist())
        threshold = torch.zeros(count, count, dtype=dtype, device=device)
        mean = torch.zeros(count + 1, dtype=dtype, device=device)
        deviation = torch.full((count + 1,), math.inf, dtype=dtype, device=device)
        if not self.calibrated:
            nothing = torch.zeros(self.vocab_size, count, dtype=dtype, device=device)
            return _Tables(False, nothing[:, 0], nothing, threshold, mean, deviation, awake)
        old = self.old_counts.to(dtype)
        # Witten-Bell: the mass set aside for unseen tokens follows how often a new one turned up in this text.
        types = (old > 0).sum()
        p_old = (old + types / self.vocab_size) / (old.sum() + types)
        new, prior = self.new_counts.to(dtype), self.config.prior_tokens
        # log of ((new + prior * p_old) / (tokens + prior)) / p_old, written so that an empty field gives exactly 0.
        ratio = (new / p_old + prior) / (new.sum(dim=-1, keepdim=True) + prior)
        tables = _Tables(True, p_old.log(), ratio.log().T.contiguous(), threshold, mean, deviation, awake)

        for field in range(count + 1):
            text = self.calibration_ids.unsqueeze(0) if field == 0 else self.sample_ids[field - 1]
            text = text[(text != BOUNDARY).any(dim=-1)].long()
            if not len(text):
                continue
            real = text != BOUNDARY
            keep = torch.where(real, self.config.decay, 0.0).to(dtype)
            added = self._ratios(text, tables.log_ratio) * (1 - self.config.decay)
            evidence = linear_recurrence(keep, added, reach=WINDOW)[real]
            own = 0.0 if field == 0 else evidence[:, field - 1 : field]
            younger = evidence[:, field:] - own
            if younger.shape[1]:
                threshold[field:, field] = self._quantile(younger).clamp_min(0.0)
            mean[field], deviation[field] = self._own_likelihood(tables, text, field)
        return tables

    def _quantile(self, evidence: Tensor) -> Tensor:
        number = evidence.shape[0]
        highest = evidence.topk(number - math.ceil(self.config.quantile * number) + 1, dim=0).values
        # Between two neighbours, so that no token of the sample sits on the threshold and falls by rounding.
        return (highest[-1] + highest[max(highest.shape[0] - 2, 0)]) / 2

    def _own_likelihood(self, tables: _Tables, text: Tensor, field: int) -> tuple[Tensor, Tensor | float]:
        """Mean log likelihood per token of a field's own text, and its deviation over pieces of PIECE tokens."""
        known = text != BOUNDARY
        places = torch.arange(text.shape[1], device=text.device)
        # Windows of calibration text lie behind each other in one row, each followed by a boundary.
        ends = torch.where(known, -1, places).cummax(dim=1).values
        position = torch.where(known, places - ends - 1, 0)
        pieces = self._pieces(tables, torch.where(known, text, 0), known, position)
        whole = pieces.length > 0
        length = pieces.length[whole]
        total = pieces.log_root[whole] + (0.0 if field == 0 else pieces.log_ratio[whole, field - 1])
        mean = total.sum() / length.sum()
        if len(length) < FEWEST_PIECES:
            return mean, math.inf
        spread = ((total / length - mean).square() * length / PIECE).mean().sqrt()
        # Text that repeats itself has next to none, and must still explain its like.
        return mean, spread.clamp_min(LEAST_DEVIATION)


def taken_by(evidence: Tensor, threshold: Tensor, awake: Sequence[bool]) -> Tensor:
    """Which field has each token: asked in order of birth, the younger must exceed the holder by its threshold.

    Args:
        evidence: (..., F).
        threshold: (F, F), as in `_Tables`.
        awake: Fields that take part.

    Returns:
        int64 (...), 0 for the root.
    """
    field = torch.zeros(evidence.shape[:-1], dtype=torch.int64, device=evidence.device)
    best = torch.zeros_like(evidence[..., 0])
    for number, takes_part in enumerate(awake):
        if takes_part:
            own = evidence[..., number]
            wins = own - best > threshold[number][field]
            field, best = torch.where(wins, number + 1, field), torch.where(wins, own, best)
    return field


def count_into(counts: Tensor, field: Tensor, ids: Tensor, known: Tensor) -> None:
    """Add tokens to the counts (F, V) of their fields, in place; those of the root, or unknown, count nowhere."""
    counted = known & (field > 0)
    rows = torch.where(counted, (field - 1) * counts.shape[1] + ids, 0)
    counts.view(-1).scatter_add_(0, rows.view(-1), counted.view(-1).long())


def _hashed(number: Tensor) -> Tensor:
    """32 bits without a pattern, int64: multiply and fold, twice."""
    for factor in (0x9E3779B1, 0x45D9F3B):
        number = (number + 1) * factor % 2**32
        number = number ^ (number >> 16)
    return number


def _resized(counts: Tensor, size: int, kept: int) -> Tensor:
    resized = counts.new_zeros(*counts.shape[:-1], size)
    resized[..., :kept] = counts[..., :kept]
    return resized


__all__ = ["FieldGate", "ReceptiveFields", "taken_by"]
