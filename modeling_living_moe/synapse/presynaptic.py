"""The presynaptic micro-model: how much an edge would release if it were used now, given how it was used before.

An edge is whatever one message passes: a sequence's way to an expert, or to a key of an attention head. It is a small
chemical machine (short-term plasticity as in Tsodyks & Markram 1997, PNAS 94(2), with its molecules named): a spike of
drive a in [0, 1] brings calcium, calcium opens docked vesicles, vesicles are recycled and that costs energy. Per token

    expected release of a spike   n = D Q p(C),      release of the token   a n

State of an edge: residual calcium C >= 0; SNARE availability Q in [0, 1]; energy E in [0, 1]; vesicles D docked, R in
reserve, U being recycled, in two stages in a row, whose transit is the delay of endocytosis. Vesicles only move:
D + R + U is constant. Every move is a fraction in [0, 1] of what is there, so pools are never negative and nothing can
explode, whatever the parameters and the drive.

A chunk of c tokens is one step in closed form: calcium is a linear recurrence; Q and E relax to a fixed point; pools
take the c-th power of one column-stochastic matrix. What these need of each other is taken at its mean over the chunk
(C, Q, drive) or at its start (E). With c = 1 the step is the reference, token by token.

What rates an edge has says its expression vector Xi, one number per molecule, through a sigmoid: xi in (0, 1). Scalars
that all edges of a layer share are learned within bounds. The module must not know where a drive comes from.

G sequences, c tokens of a chunk, N edges (any trailing shape that expression has), X molecules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

#: Order of the components of an expression vector.
MOLECULES = (
    "pv", "cam", "rim", "munc13", "munc18", "nsf", "csp", "syt1", "syt7", "complexin", "doc2", "synapsin", "actin",
    "clathrin", "dynamin", "rab", "v_atpase", "vdac", "vglut", "sv2",
)  # fmt: skip
#: D + R + U of every edge.
VESICLES = 24.0
#: Energy at which docking, refilling and priming run at half their greatest rate.
HALF_ENERGY = 0.5
#: Energy per vesicle released, endocytosed, refilled; and per unit of SNARE primed.
RELEASE_COST, ENDOCYTOSIS_COST, PUMP_COST, PRIMING_COST = 0.02, 0.01, 0.01, 0.02
#: Share of the zippered SNAREs of a docked vesicle that its release uses up.
SNARE_USE = 0.5
#: Share of Doc2's tail in the release probability.
DOC2_SHARE = 0.2

#: Shared scalars: lowest, first and highest value. Times in tokens, rates per turn (see `Presynapse.rates`).
SCALARS: dict[str, tuple[float, float, float]] = {
    "calcium_time": (1.0, 8.0, 64.0),
    "influx": (0.1, 1.0, 10.0),
    "syt1_half": (0.2, 1.2, 8.0),
    "syt7_half": (0.2, 1.0, 8.0),
    "doc2_half": (0.02, 0.2, 2.0),
    "priming": (0.02, 0.5, 2.0),
    "docking": (0.005, 0.1, 2.0),
    "undocking": (0.01, 0.3, 4.0),
    "endocytosis": (0.02, 0.5, 4.0),
    "refill": (0.01, 0.25, 4.0),
    "supply": (0.005, 0.1, 2.0),
}


class PresynapticState(NamedTuple):
    """fp32. `pools` (G, N, 4): D, the early and the late stage of U, and R; the others (G, N)."""

    calcium: Tensor
    snare: Tensor
    energy: Tensor
    pools: Tensor

    def pack(self) -> Tensor:
        """(G, N, 7), for a cache."""
        return torch.cat([torch.stack(self[:3], dim=-1), self.pools], dim=-1)

    @classmethod
    def unpack(cls, packed: Tensor) -> PresynapticState:
        calcium, snare, energy = packed[..., :3].unbind(-1)
        return cls(calcium, snare, energy, packed[..., 3:])


#: Numbers of one edge's state.
STATE_SIZE = 7


class Rates(NamedTuple):
    """What expression makes of an edge, each (N,); `early` and `late` are the fractions of the stages of U."""

    decay: Tensor  # of calcium per token
    influx: Tensor  # calcium of a full spike
    per_syt1: Tensor  # inverse of the calcium that half opens the fast sensor, the clamp included
    per_syt7: Tensor  # inverse squares and inverse of the slow sensors' half points
    per_doc2: Tensor
    past_syt1: Tensor  # least probability of staying shut, of each sensor
    past_syt7: Tensor
    past_doc2: Tensor
    priming: Tensor  # fractions per token
    docking: Tensor
    undocking: Tensor
    early: Tensor
    late: Tensor
    supply: Tensor
    quantum: Tensor  # effect of one vesicle


def over_sequences(rates: Rates, sequences: int) -> Rates:
    """The same rates with a dimension of sequences in front: their gradients are then summed over it only once."""
    return Rates(*(rate.expand(sequences, *rate.shape) for rate in rates))


class Drive(NamedTuple):
    """A chunk's drive, summed up as the state needs it."""

    calcium: Tensor  # (2, G, N): what the drives leave on average before each token, and at the end of the chunk
    mean: Tensor  # (G, N), of the drives
    tokens: int


class ChunkWeights(NamedTuple):
    """What is the same for every chunk of a pass."""

    weights: Tensor  # (3, c, N), of the tokens in `Drive`: calcium on average and at the end, and the mean
    left: Tensor  # (2, 1, N), how much of the first calcium is there on average and at the end
    moves: Tensor  # (5, 16), what a fraction that moves adds to the flat transition matrix
    still: Tensor  # (16,), the matrix in which nothing moves
    costs: Tensor  # (3,), energy per vesicle released, endocytosed, refilled
    tokens: int


#: Draws the fraction released in a token from its expectation (G, N), the docked vesicles, and the tokens of the chunk.
Sampler = Callable[[Tensor, Tensor, int], Tensor]


class Presynapse(nn.Module):
    """Shared scalars, and the equations. Parameters: `scalars`, one raw value each, 0 at the first value."""

    def __init__(self) -> None:
        super().__init__()
        self.scalars = nn.Parameter(torch.zeros(len(SCALARS)))

    def reset_parameters(self) -> None:
        init.zeros_(self.scalars)

    def shared(self) -> dict[str, Tensor]:
        """The shared scalars, 0-dim fp32, strictly within their bounds: low and high are reached at -inf and inf."""
        bounds = torch.tensor(list(SCALARS.values()), device=self.scalars.device, dtype=torch.float32).log()
        low, first, high = bounds.unbind(1)
        start = torch.logit((first - low) / (high - low))
        values = (low + (high - low) * torch.sigmoid(start + self.scalars.float())).exp()
        return dict(zip(SCALARS, values.unbind(), strict=True))

    def forward(self, expression: Tensor, turn: float) -> Rates:
        """`rates`. Only to what is called does Accelerate bring offloaded weights."""
        return self.rates(expression, turn)

    def rates(self, expression: Tensor, turn: float) -> Rates:
        """What expression makes of each edge.

        Args:
            expression: Raw vectors Xi, (..., X); 0 is medium expression.
            turn: Tokens between two uses of an edge that is used at the average rate, >= 1. Vesicles and energy recover
                in turns, so that an average edge is as tired among 8 as among 8000.
        """
        xi = dict(zip(MOLECULES, torch.sigmoid(expression.float()).unbind(-1), strict=True))
        shared = self.shared()

        def fraction(rate: Tensor) -> Tensor:
            return -torch.expm1(-rate / turn)

        time = shared["calcium_time"] * (0.5 + xi["cam"]) * 2.0 / (1.0 + 2.0 * xi["pv"])
        clamped = shared["syt1_half"] * (0.5 + xi["complexin"])
        availability = torch.sigmoid(2 * xi["munc13"] - 2 * xi["munc18"] + xi["csp"] - 0.5)
        mobile = torch.sigmoid(2 * xi["synapsin"] + 1.6 * xi["actin"] - 1.8)
        active_zone = (1.0 + 1.5 * xi["rim"] + 0.8 * xi["munc13"]) / 2.15
        uptake = torch.sigmoid(2 * xi["clathrin"] + 2.4 * xi["dynamin"] - 2.2)
        pumping = torch.sigmoid(2 * xi["v_atpase"] + xi["rab"] - 1.5)
        return Rates(
            decay=torch.exp(-1.0 / time),
            influx=shared["influx"] * (1.0 + 1.5 * xi["rim"]),
            per_syt1=1.0 / (1.5 * clamped),
            per_syt7=shared["syt7_half"] ** -2 + torch.zeros_like(clamped),
            per_doc2=1.0 / shared["doc2_half"] + torch.zeros_like(clamped),
            past_syt1=1.0 - xi["syt1"],
            past_syt7=1.0 - xi["syt7"],
            past_doc2=1.0 - DOC2_SHARE * xi["doc2"],
            priming=fraction(shared["priming"] * 2.0 * (0.5 + xi["nsf"]) * availability),
            docking=fraction(shared["docking"] * 2.0 * mobile * active_zone),
            undocking=fraction(shared["undocking"]) + torch.zeros_like(clamped),
            early=fraction(shared["endocytosis"] * 2.0 * uptake),
            late=fraction(shared["refill"] * 2.0 * pumping),
            supply=fraction(shared["supply"] * (1.0 + 1.5 * xi["vdac"]) / 1.75),
            quantum=(0.5 + xi["vglut"]) * (1.0 + 0.3 * (xi["sv2"] - 0.5)),
        )


def rest(rates: Rates) -> PresynapticState:
    """The fixed point without drive: no calcium, everything primed, docking and undocking in balance."""
    docked = VESICLES * rates.docking / (rates.docking + rates.undocking)
    none, full = torch.zeros_like(docked), torch.ones_like(docked)
    pools = torch.stack([docked, none, none, VESICLES - docked], dim=-1)
    return PresynapticState(none, full, full, pools)


def release_probability(calcium: Tensor, rates: Rates) -> Tensor:
    """p in [0, 1): a vesicle stays only if no sensor opens it.

    The fast sensor (Syt1, cooperativity 4) sees the spike's own calcium on top of the residue, against the clamp of
    complexin; the slow one (Syt7, cooperativity 2) and the tail (Doc2, half at little calcium) see the residue.
    """
    fourth = ((calcium + rates.influx) * rates.per_syt1).square().square()
    square = calcium.square() * rates.per_syt7
    tail = calcium * rates.per_doc2
    # 1 - share x / (1 + x), for each sensor.
    fast = (1.0 + rates.past_syt1 * fourth) / (1.0 + fourth)
    slow = (1.0 + rates.past_syt7 * square) / (1.0 + square)
    low = (1.0 + rates.past_doc2 * tail) / (1.0 + tail)
    return 1.0 - fast * slow * low


def released_content(state: PresynapticState, probability: Tensor, rates: Rates) -> Tensor:
    """q n of a spike, (G, N): what a message would weigh now. `probability` is p of the state's calcium."""
    return rates.quantum * state.pools[..., 0] * state.snare * probability


#: What a fraction that moves adds to the flat transition matrix (to, from) of D, U, U', R: D -> U, U -> U', U' -> R,
#: R -> D, D -> R.
_MOVES = (
    (-1.0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    (0, 0, 0, 0, 0, -1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0),
    (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1, 0, 0, 0, 1, 0),
    (0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, -1),
    (-1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0),
)


def chunk_weights(rates: Rates, tokens: int) -> ChunkWeights:
    """What a chunk's tokens weigh in its `Drive`; once per pass."""
    decay, c = rates.decay, tokens
    # After the token: its calcium decays for the rest of the chunk, itself included.
    lasts = torch.arange(c, 0, -1, device=decay.device, dtype=decay.dtype)
    lasts = lasts.reshape(c, *[1] * decay.dim())
    at_end = rates.influx * decay**lasts
    # Sum of decay ** k over the tokens after it.
    on_average = rates.influx * (decay - decay**lasts) / ((1.0 - decay) * c)
    end = decay**c
    left = torch.stack([(1.0 - end) / ((1.0 - decay) * c), end]).unsqueeze(1)
    return ChunkWeights(
        weights=torch.stack([on_average, at_end, torch.full_like(at_end, 1.0 / c)]),
        left=left,
        moves=decay.new_tensor(_MOVES),
        still=torch.eye(4, device=decay.device, dtype=decay.dtype).flatten(),
        costs=decay.new_tensor([RELEASE_COST, ENDOCYTOSIS_COST, PUMP_COST]),
        tokens=c,
    )


def sum_up(drive: Tensor, weights: ChunkWeights) -> Drive:
    """Drives of a chunk's tokens (G, c, N), each in [0, 1], as the state needs them."""
    sums = (drive.unsqueeze(0) * weights.weights.unsqueeze(1)).sum(2)
    return Drive(sums[:2], sums[2], weights.tokens)


def advance(
    state: PresynapticState, drive: Drive, weights: ChunkWeights, rates: Rates, sample: Sampler | None = None
) -> tuple[PresynapticState, Tensor]:
    """The state after a chunk, and p of its calcium.

    Args:
        sample: Draws what is released instead of taking the expectation.
    """
    c = drive.tokens
    calcium = torch.addcmul(drive.calcium, weights.left, state.calcium)
    typical_probability, probability = release_probability(calcium, rates).unbind()
    vigour = state.energy * (1.0 + HALF_ENERGY) / (state.energy + HALF_ENERGY)
    priming = rates.priming * vigour
    use = drive.mean * typical_probability
    snare, typical_snare = _relax(state.snare, priming, SNARE_USE * use, c)
    released = use * typical_snare
    if sample is not None:
        released = sample(released, state.pools[..., 0], c)
    undocked = rates.undocking * (1.0 - released)
    moves = torch.stack(
        torch.broadcast_tensors(released, rates.early, rates.late * vigour, rates.docking * vigour, undocked), dim=-1
    )
    pools = _circulate(state.pools, moves, weights)
    # What moves pays, by the means before and after.
    paid = moves[..., :3] * (state.pools + pools)[..., :3] @ (0.5 * weights.costs)
    cost = paid + PRIMING_COST * (priming * (1.0 - typical_snare))
    energy = _relax(state.energy, rates.supply, cost / (1.0 + cost), c)[0]
    return PresynapticState(calcium[1], snare, energy, pools), probability


def _relax(value: Tensor, gain: Tensor, loss: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """`tokens` times v <- (1 - loss) v, then v <- v + gain (1 - v); the last value, and the mean of those before.

    All in [0, 1], gain above 0.
    """
    change = gain + loss - gain * loss
    target = gain / change
    # No 1 - (1 - change) ** tokens: change may be tiny.
    done = -torch.expm1(tokens * torch.log1p(-change))
    distance = value - target
    return value - distance * done, target + distance * (done / (change * tokens))


def _circulate(pools: Tensor, moves: Tensor, weights: ChunkWeights) -> Tensor:
    """Pools (G, N, 4) after a chunk in each of whose tokens these fractions (G, N, 5) move."""
    matrix = torch.addmm(weights.still, moves.flatten(0, -2), weights.moves)
    # Rounding must not make a rest negative, nor add up over a long text.
    matrix = matrix.clamp(min=0.0).view(-1, 4, 4)
    moved = torch.linalg.matrix_power(matrix, weights.tokens) @ pools.reshape(-1, 4, 1)
    return (moved * (VESICLES / moved.sum(1, keepdim=True))).view(pools.shape)


__all__ = [
    "MOLECULES",
    "SCALARS",
    "STATE_SIZE",
    "VESICLES",
    "ChunkWeights",
    "Drive",
    "Presynapse",
    "PresynapticState",
    "Rates",
    "Sampler",
    "advance",
    "chunk_weights",
    "over_sequences",
    "release_probability",
    "released_content",
    "rest",
    "sum_up",
]
