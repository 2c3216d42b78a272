"""Router edges: experts tire and are primed along a text (see `presynaptic.py`), and the router's scores know it.

The score of an address gets

    strength * log(epsilon + q n / g),

q n what the edge would release now, g the running mean of what tokens released, per text and without a gradient (it
moves all scores of a token alike, so that they neither sink nor rise with use). `strength` is learned and starts at 0,
where nothing changes. A token is scored with the state at the start of its chunk and drives each clade by its own soft
routing: the softmax (or normalised sigmoid) of the scores so changed, over the clades it sees. Nothing harder: soft
probabilities are differentiable in every score, need no choice, and change little where a choice flips.

Drive is shared by all addresses of a clade, expression is an address's own. So a split, which copies expression, is
exact: parent and newborn are in one state, and stay so until their expression parts. Expression belongs to the address,
like the key: it is averaged where keys are, and a tombstone keeps it.

T tokens of a pass (of G texts in J chunks of c), A addresses, N clades a token sees, X molecules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from living_moe.configuration.errors import PopulationError
from living_moe.configuration.sections import SynapseConfig
from living_moe.modeling_living_moe.families import Scoring
from living_moe.modeling_living_moe.population import KeepsDtype, Population, View, sort_slabs
from living_moe.modeling_living_moe.synapse.presynaptic import (
    MOLECULES,
    STATE_SIZE,
    Presynapse,
    PresynapticState,
    Rates,
    Sampler,
    advance,
    chunk_weights,
    over_sequences,
    release_probability,
    released_content,
    rest,
    sum_up,
)
from living_moe.modeling_living_moe.synapse.texts import SynapseLayer, Texts, kept_of

#: Tokens over which the running mean of what was released forgets.
GAIN_TIME = 64.0

#: What the running mean starts from: about what a rested edge of medium expression releases. A constant, because no
#: event may move it.
FIRST_RELEASE = 1.4


class Economy(NamedTuple):
    """What one pass left of a router's edges, over the texts and full chunks of it, at the ends of these.

    With E energy and D the docked vesicles of an edge, D0 those at rest:

        energy spent    mean over texts, chunks and addresses of 1 - E
        depletion       the same mean of max(1 - D / D0, 0)

    The prototypes' loss of pools caps D + R + U; here that sum is constant, and what can run out is D.

    Attributes:
        sums: Sums of E and of depletion over texts and chunks, (2, A), without a gradient.
        times: Texts times chunks, 0-dim; 0 where all texts are shorter than a chunk.
        losses: The two means, (2,), with a gradient if the pass was asked for losses.
    """

    sums: Tensor
    times: Tensor
    losses: Tensor


#: Finds the address of each clade and token: int64 (T, N), or None where address n is clade n's.
Served = Callable[[View], Tensor | None]


@dataclass
class Passage:
    """What the routers of one forward pass need to know of texts, and leave behind.

    Attributes:
        texts: The grid.
        record: Whether a cache asks for traces.
        step: Optimizer steps lived; with seed and layer it determines what stochastic release draws.
        kept: What the cache kept of its tokens per living layer, (B, P, A + 1) each: drives, and what was released.
        states: The cache's states per living layer, (B, 7 A + 1).
        traces: Living layer -> what to keep of this pass's tokens (B, S, A + 1), and the states (B, 7 A + 1).
        accounts: Whether somebody asks for economies.
        has_losses: Whether their losses need a gradient.
        economies: Living layer -> what this pass left of its edges.
    """

    texts: Texts
    record: bool = False
    step: int = 0
    kept: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    traces: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    accounts: bool = False
    has_losses: bool = False
    economies: dict[int, Economy] = field(default_factory=dict)

    def take_up(self, history: SynapseLayer, addresses: Sequence[int], version: int) -> None:
        """Divide what the cache keeps (B, P, any), and its states (B, any), among layers with so many addresses.

        Args:
            version: Of the population; another one may have as many addresses in another order.

        Raises:
            PopulationError: The cache is of another population.
        """
        kept, states, sizes = kept_of(history), history.state, [count + 1 for count in addresses]
        if kept.shape[-1] != sum(sizes) or history.version != version:
            raise PopulationError(
                f"the cache holds {kept.shape[-1] - len(sizes)} synapses of a population that has changed since, and "
                f"the routers have {sum(addresses)}: read the text anew with a new cache."
            )
        self.kept = dict(enumerate(kept.split(sizes, dim=-1)))
        if states is not None:
            self.states = dict(enumerate(states.split([STATE_SIZE * count + 1 for count in addresses], dim=-1)))

    def to(self, device: torch.device | str) -> Passage:
        """The same on another device; traces are left in one place."""
        return replace(self, texts=self.texts.to(device))


class Expression(nn.ParameterDict):
    """Expression vectors per slab, (C, X) each, listed in slot order whatever the order they came in."""

    # A ParameterDict refuses to be called, but only to what is called does Accelerate bring offloaded weights.
    __call__ = nn.Module.__call__

    def forward(self, alive: dict[str, int]) -> Tensor:
        """Vectors of the first rows of each slab, as many as `alive` says, in slot order: (E, X)."""
        return torch.cat([self[slab][:count] for slab, count in alive.items()])

    def __setitem__(self, key: str, value: nn.Parameter) -> None:
        super().__setitem__(key, value)
        for entries in (self._keys, self._parameters):
            sort_slabs(entries)

    def reset_parameters(self) -> None:
        for vectors in self.values():
            init.zeros_(vectors)


class TombstoneExpression(KeepsDtype):
    """Expression vectors of the addresses without an expert, fp32 (D, X)."""

    expression: Tensor

    def __init__(self, count: int):
        super().__init__()
        # A model that is loaded in bf16 is built with bf16 as the default.
        self.register_buffer("expression", torch.zeros(count, len(MOLECULES), dtype=torch.float32))

    def write(self, vectors: Sequence[Tensor]) -> None:
        """Replace them by these, (X,) each."""
        self.expression = torch.stack([v.to(self.expression) for v in vectors]) if vectors else self.expression[:0]

    def reset_parameters(self) -> None:
        """None: a fresh population has no tombstones; leaves alone what a checkpoint has loaded."""
        if not getattr(self.expression, "_is_hf_initialized", False):
            self.expression = self.expression.new_zeros(0, len(MOLECULES))


class RouterSynapse(nn.Module):
    """Short-term memory of one router's edges.

    Parameters: `expression`, `presynapse.scalars`, and `strength` (1,).
    """

    def __init__(
        self,
        settings: SynapseConfig,
        scoring: Scoring,
        capacities: dict[str, int],
        layer: int = 0,
        num_tombstones: int = 0,
    ):
        super().__init__()
        self.settings = settings
        self.scoring = scoring
        self.layer = layer
        self.presynapse = Presynapse()
        self.strength = nn.Parameter(torch.full((1,), settings.strength))
        self.expression = Expression()
        for name, capacity in capacities.items():
            if capacity:
                self.expression[name] = nn.Parameter(torch.zeros(capacity, len(MOLECULES)))
        self.tombstones = TombstoneExpression(num_tombstones)

    def reset_parameters(self) -> None:
        init.constant_(self.strength, self.settings.strength)

    def forward(
        self,
        logits_TA: Tensor,
        population: Population,
        served: Served,
        field_T: Tensor | None = None,
        fields: Sequence[int] = (),
        passage: Passage | None = None,
        record: bool = False,
    ) -> Tensor:
        """Scores with what the synapses add, (T, A), in the dtype they came in.

        Args:
            logits_TA: Scores of every address.
            population: Who lives here.
            served: As the router finds them.
            field_T, fields: The field of each token, and the newborn fields that tokens are in.
            passage: The texts of this pass; None is one text at rest.
            record: Leave in `passage` what a cache must keep.
        """
        # Pools are sums and differences of what is nearly equal: never in less than fp32.
        with torch.autocast(logits_TA.device.type, enabled=False):
            return self._changed(logits_TA, population, served, field_T, fields, passage, record)

    def _changed(
        self,
        logits_TA: Tensor,
        population: Population,
        served: Served,
        field_T: Tensor | None,
        fields: Sequence[int],
        passage: Passage | None,
        record: bool,
    ) -> Tensor:
        if passage is None:
            shape = (1, logits_TA.shape[0])
            chunk = self.settings.chunk
            texts = Texts(shape, (1, max(1, -(-shape[1] // chunk)), chunk), True, shape[1] % chunk == 0)
            passage = Passage(texts)
        texts = passage.texts
        num_texts, num_chunks, length = texts.grid
        root = population.view(0, logits_TA.device)
        vectors = self.expression(population.alive)
        if len(self.tombstones.expression):
            vectors = torch.cat([vectors.float(), self.tombstones.expression])
        turn = float(len(root.address_N))
        own_rates = self.presynapse(vectors, turn)
        weights = chunk_weights(own_rates, length)
        rates = over_sequences(own_rates, num_texts)
        sample = self._sampler(passage, num_texts, vectors)
        columns = self._columns(population, root, served, field_T, fields, texts)

        state, running = self._start(passage, rates)
        probability = release_probability(state.calcium, rates)
        logits_GJcA = texts.lay_out(logits_TA.float())
        known = self._known(passage)
        forgets = 1.0 - math.exp(-length / GAIN_TIME)
        outputs, drives, states = [], [], [self._packed(state, running)] if record else []
        left: list[PresynapticState] = []
        for number, logits_GcA in enumerate(logits_GJcA.unbind(1)):
            content = released_content(state, probability, rates)
            heard = torch.log(self.settings.epsilon + content / running.unsqueeze(-1))
            changed = logits_GcA + (self.strength.float() * heard).unsqueeze(1)
            outputs.append(changed)
            last = number + 1 == num_chunks
            moves = not last or ((record or passage.accounts) and texts.last_is_full)
            if not (moves or record):
                break
            drive, released = self._drive(changed, content, columns, number)
            if number < texts.past_chunks:
                assert known is not None
                past, is_past = known[0][:, number], known[1][:, number]
                drive = torch.where(is_past, past[..., :-1], drive)
                released = torch.where(is_past[..., 0], past[..., -1], released)
            if record:
                drives.append(torch.cat([drive.detach(), released.unsqueeze(-1)], dim=-1))
            if moves:
                state, probability = advance(state, sum_up(drive, weights), weights, rates, sample)
                running = running + forgets * (released.mean(1) - running)
                left.append(state)
                if record:
                    states.append(self._packed(state, running))
        changed_TA = texts.gather(torch.stack(outputs, dim=1))
        if texts.real is not None:
            changed_TA = torch.where(texts.real.reshape(-1, 1), changed_TA, logits_TA.float())
        if record:
            passage.traces[self.layer] = self._trace(texts, drives, states)
        if passage.accounts:
            passage.economies[self.layer] = self._economy(passage, left, rates)
        return changed_TA.to(logits_TA.dtype)

    # -- state ---------------------------------------------------------------------------------------------------------

    def _start(self, passage: Passage, rates: Rates) -> tuple[PresynapticState, Tensor]:
        """State and running mean (G,) of every text: the cache's, or at rest."""
        texts = passage.texts
        resting = rest(rates)
        running = rates.decay.new_full((texts.grid[0],), FIRST_RELEASE)
        if texts.first is None or self.layer not in passage.states:
            return resting, running
        states = passage.states[self.layer].to(running.device)[texts.first.clamp(min=0)]
        goes_on = texts.first >= 0
        kept = PresynapticState.unpack(states[:, 1:].unflatten(1, (-1, STATE_SIZE)))
        edges = [
            torch.where(goes_on.reshape(-1, *[1] * (now.dim() - 1)), now, then)
            for now, then in zip(kept, resting, strict=True)
        ]
        return PresynapticState(*edges), torch.where(goes_on, states[:, 0], running)

    @staticmethod
    def _packed(state: PresynapticState, running: Tensor) -> Tensor:
        """(G, 1 + 7 A)."""
        return torch.cat([running.unsqueeze(1), state.pack().flatten(1)], dim=1).detach()

    def _known(self, passage: Passage) -> tuple[Tensor, Tensor] | None:
        """What the cache kept of the tokens on the first chunks, (G, chunks, c, A + 1), and where it is."""
        if not passage.texts.past_chunks:
            return None
        kept = passage.kept[self.layer].to(self.strength.device)
        return passage.texts.past(kept.flatten(0, 1))

    def _trace(self, texts: Texts, drives: list[Tensor], states: list[Tensor]) -> tuple[Tensor, Tensor]:
        kept = texts.gather(torch.stack(drives, dim=1)).unflatten(0, texts.shape)
        if texts.end_chunks is None:
            return kept, states[-1]
        assert texts.end_text is not None
        return kept, torch.stack(states)[texts.end_chunks.clamp(max=len(states) - 1), texts.end_text]

    def _economy(self, passage: Passage, left: list[PresynapticState], rates: Rates) -> Economy:
        """What is left at the ends of the first chunks; a text's part of a chunk has no end."""
        resting = rest(rates).pools[:, :, 0]
        if not left:
            nothing = resting.new_zeros(2, resting.shape[1])
            return Economy(nothing, nothing.sum(), nothing.sum(1))
        energy_JGA = torch.stack([state.energy for state in left])
        gone_JGA = torch.relu(1.0 - torch.stack([state.pools[..., 0] for state in left]) / resting)
        full_JG = passage.texts.full_chunks(resting.device)[:, : len(left)].T.to(resting.dtype)
        sums = torch.einsum("sjga,jg->sa", torch.stack([energy_JGA, gone_JGA]), full_JG)
        count = full_JG.sum()
        means = sums.mean(1) / count.clamp_min(1.0)
        losses = torch.stack([(count > 0).to(means) - means[0], means[1]])
        return Economy(sums.detach(), count, losses if passage.has_losses else losses.detach())

    # -- drive ---------------------------------------------------------------------------------------------------------

    def _columns(
        self,
        population: Population,
        root: View,
        served: Served,
        field_T: Tensor | None,
        fields: Sequence[int],
        texts: Texts,
    ) -> list[tuple[View, Tensor | None, Tensor | None]]:
        """Per field: its view, the addresses of its clades (G, J, c, N), and whose tokens are of it (G, J, c, 1)."""
        found = []
        for number in (0, *(fields if field_T is not None else ())):
            view = root if number == 0 else population.view(number, root.address_N.device)
            address_TN = served(view)
            address = None if address_TN is None else texts.lay_out(address_TN)
            mine = None
            if number:
                assert field_T is not None
                mine = texts.lay_out((field_T == number).unsqueeze(-1))
            found.append((view, address, mine))
        return found

    def _drive(
        self,
        changed: Tensor,
        content: Tensor,
        columns: list[tuple[View, Tensor | None, Tensor | None]],
        number: int,
    ) -> tuple[Tensor, Tensor]:
        """Drive of each address (G, c, A), and what each token releases (G, c)."""
        drive = released = None
        quanta = content.detach()
        for view, address, mine in columns:
            if address is None:
                own = self._soft(changed)
                carried = (own.detach() @ quanta.unsqueeze(-1)).squeeze(-1)
            else:
                here = address[:, number]
                routed = self._soft(changed.gather(2, here))
                carried = (routed.detach() * quanta.unsqueeze(1).expand_as(changed).gather(2, here)).sum(-1)
                own = torch.nn.functional.pad(routed, (0, 1))[..., view.column_A]
            if drive is None or released is None or mine is None:
                drive, released = own, carried
            else:
                drive = torch.where(mine[:, number], own, drive)
                released = torch.where(mine[:, number, :, 0], carried, released)
        assert drive is not None and released is not None
        return drive, released

    def _soft(self, logits: Tensor) -> Tensor:
        """Soft routing over clades, summing to one."""
        if self.scoring.function == "softmax":
            return torch.softmax(logits, dim=-1)
        scores = torch.sigmoid(logits)
        return scores / (scores.sum(-1, keepdim=True) + 1e-20)

    def _sampler(self, passage: Passage, num_texts: int, vectors: Tensor) -> Sampler | None:
        if not self.training or self.settings.mode != "stochastic":
            return None
        seed = (self.settings.seed, passage.step, self.layer)
        return binomial_release(seed, self.settings.stochastic_share, (num_texts, len(vectors)), vectors.device)


def binomial_release(seed: tuple[int, ...], share: float, shape: tuple[int, ...], device: torch.device) -> Sampler:
    """Release as a whole number of vesicles on a share of the edges, with the gradient of its expectation.

    Args:
        seed: Seed, step, layer and the like: the same draw the same, so that a recomputation sees its own pass.
        share: Of the edges, in [0, 1].
        shape: Texts and edges; of the last dimension a draw may take a beginning.
    """
    mixed = 0
    for part in seed:
        mixed = (mixed * 1_000_003 + part) % (1 << 63)
    generator = torch.Generator(device).manual_seed(mixed)
    chosen = torch.rand(shape, generator=generator, device=device) < share

    def sample(fraction: Tensor, docked: Tensor, tokens: int) -> Tensor:
        with torch.no_grad():
            chance = -torch.expm1(tokens * torch.log1p(-fraction))
            whole = docked.floor()
            count = torch.binomial(whole, chance, generator=generator)
            # What is left of a vesicle goes as one, so the mean is right and never more leaves than there is.
            part = torch.rand(fraction.shape, generator=generator, device=device) < chance
            count = count + (docked - whole) * part
            gone = (count / docked.clamp_min(1e-12)).clamp(max=1.0)
            # As large a part of the expected fraction as what leaves is of what was expected to leave: linear in what
            # is drawn, or its mean would be another. At most 1, as no token's fraction is above that of all.
            drawn = fraction * gone / chance.clamp_min(1e-30)
            step = torch.where(chosen[..., : fraction.shape[-1]], drawn - fraction, 0.0)
        return fraction + step

    return sample


__all__ = ["Economy", "Expression", "Passage", "RouterSynapse", "TombstoneExpression", "binomial_release"]
