"""The nested sections of `LivingMoeConfig`, one per concern.

Each section is a plain dataclass, validated on construction by its own `validate`; a misspelt key or a value without
sense raises `ConfigurationError` naming the field, the value and the remedy. Sections hold choices, never state:
populations, vitals and lineage live in the model.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from living_moe.configuration.errors import ConfigurationError
from living_moe.configuration.slabs import MOST_TIERS

SectionT = TypeVar("SectionT", bound="Section")


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """A " Did you mean ...?" clause for the closest known word, or the list of known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."


@dataclass(kw_only=True)
class Section:
    """Base of the sections: strict construction from a dict, type checks, plain-dict export."""

    section_name: ClassVar[str] = ""

    def __new__(cls: type[SectionT], **values: Any) -> SectionT:
        # Before the generated `__init__`, whose TypeError for a misspelt key would be no ConfigurationError.
        for name in values:
            cls._require_field(name)
        return super().__new__(cls)

    if not typing.TYPE_CHECKING:  # type checkers would take it for a licence to assign any name

        def __setattr__(self, name: str, value: Any) -> None:
            self._require_field(name)
            super().__setattr__(name, value)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(cls))

    @classmethod
    def _require_field(cls, name: str) -> None:
        known = cls.field_names()
        if name not in known:
            raise ConfigurationError(f"unknown field {cls.section_name}.{name}.{did_you_mean(name, known)}")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            setattr(self, field.name, self._checked(field.name, value, hints[field.name]))
        self.validate()

    def _checked(self, name: str, value: Any, hint: Any) -> Any:
        hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if isinstance(value, (list, tuple)) and list[int] in hints and all(type(item) is int for item in value):
            return list(value)
        accepted = tuple(kind for kind in hints if isinstance(kind, type) and kind != list[int])
        if isinstance(value, bool):
            ok = bool in accepted
        elif isinstance(value, int) and int not in accepted and float in accepted:
            return float(value)
        else:
            ok = isinstance(value, accepted)
        spelt = {type(None): "None", list[int]: "a list of int"}
        names = " or ".join(spelt.get(kind) or kind.__name__ for kind in hints)
        if not ok:
            raise ConfigurationError(f"{self.section_name}.{name} must be {names}, got {value!r}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigurationError(
                f"{self.section_name}.{name} must be a finite {names}, got {value!r}; a large number means never."
            )
        return value

    def validate(self) -> None:
        """Raise `ConfigurationError` if the values make no sense together."""

    def require(self, name: str, ok: bool, wanted: str) -> None:
        if not ok:
            raise ConfigurationError(f"{self.section_name}.{name} must be {wanted}, got {getattr(self, name)!r}.")

    def require_one_of(self, name: str, known: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in known:
            raise ConfigurationError(f"{self.section_name}.{name} is {value!r}.{did_you_mean(str(value), known)}")

    @classmethod
    def from_value(cls: type[SectionT], value: SectionT | dict[str, Any] | None) -> SectionT:
        """A section from a dict of its fields, an instance (copied), or None (defaults)."""
        if value is None:
            return cls()
        if isinstance(value, cls):
            return dataclasses.replace(value)
        if not isinstance(value, dict):
            raise ConfigurationError(f"{cls.section_name} must be a dict of its fields, got {value!r}.")
        return cls(**{str(key): field for key, field in value.items()})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(kw_only=True)
class RouterConfig(Section):
    """How tokens are scored against keys. The family's own scoring rule comes from `backbone_config`."""

    section_name: ClassVar[str] = "router"

    #: Weight of the load-balancing loss when router logits are output; None takes the backbone's own.
    aux_loss_coef: float | None = None
    #: Weight of the router z-loss, mean logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906; typical 1e-3).
    z_loss_coef: float = 0.0
    #: What maps the router's input to a query: identity (a pretrained linear router is that), linear, mlp.
    query_network: str = "identity"
    #: Length of queries and keys; None is the hidden size, which identity needs.
    d_key: int | None = None
    #: Hidden width of an mlp query network; None is the length of a query.
    query_hidden: int | None = None
    #: A score is the dot product of query and key, or their cosine; either is divided by the temperature.
    similarity: str = "dot"
    temperature: float = 1.0
    #: Learn the temperature, from `temperature` on and within a factor of 16 of it (see `LearnedTemperature`).
    learn_temperature: bool = False
    #: Dot products with keys of unit length (cosine has them anyway).
    normalise_keys: bool = False
    #: Who is chosen: the source family's own rule, or top_any, every clade whose score is above the layer's threshold.
    selection: str = "family"
    #: top_any: weights of the chosen are a softmax over them, the threshold learned through a straight-through
    #: estimator (DynMoE, arXiv:2405.14297), or the rectified height above the threshold (ReMoE, arXiv:2412.14711).
    gate: str = "straight_through"
    #: top_any: the threshold at the start, in units of a score.
    threshold: float = 0.0
    #: top_any: bound on the experts of one token; None is twice the family's number.
    max_experts_per_token: int | None = None
    #: top_any: experts per token that the threshold is steered to, on average; None is the family's number.
    target_experts_per_token: float | None = None
    #: top_any: change of the threshold per optimizer step and unit of relative error of the density; 0 leaves it alone.
    threshold_rate: float = 0.01
    #: Step of the selection biases towards balance, without gradients (arXiv:2408.15664); 0 leaves them alone.
    bias_update_rate: float = 0.0
    #: How keys are searched: exact, two_stage, faiss_hnsw, faiss_ivf, or auto: two_stage from `search_from` keys on.
    search: str = "auto"
    #: auto: number of keys from which the two-stage search is faster (`benchmarks/routing.py` prints the crossover).
    search_from: int = 4096
    #: Recall of the chosen experts below which a search, measured while it runs, gives way to the exact one.
    min_recall: float = 0.97

    def validate(self) -> None:
        self.require("aux_loss_coef", self.aux_loss_coef is None or self.aux_loss_coef >= 0, "None or >= 0")
        self.require("z_loss_coef", self.z_loss_coef >= 0, ">= 0")
        self.require_one_of("query_network", ("identity", "linear", "mlp"))
        self.require_one_of("similarity", ("dot", "cosine"))
        self.require_one_of("selection", ("family", "top_any"))
        self.require_one_of("gate", ("straight_through", "relu"))
        self.require_one_of("search", ("auto", "exact", "two_stage", "faiss_hnsw", "faiss_ivf"))
        for name in ("d_key", "query_hidden", "max_experts_per_token"):
            self.require(name, getattr(self, name) is None or getattr(self, name) >= 1, "None or >= 1")
        identity = self.query_network == "identity"
        self.require("d_key", not (identity and self.d_key), "None with query_network='identity'; choose linear or mlp")
        self.require("query_hidden", self.query_hidden is None or self.query_network == "mlp", "None without an mlp")
        self.require("temperature", self.temperature > 0, "> 0")
        target = self.target_experts_per_token
        self.require("target_experts_per_token", target is None or target >= 1, "None or >= 1")
        self.require("threshold_rate", self.threshold_rate >= 0, ">= 0")
        self.require("bias_update_rate", self.bias_update_rate >= 0, ">= 0")
        self.require("search_from", self.search_from >= 1, ">= 1")
        self.require("min_recall", 0 < self.min_recall <= 1, "in (0, 1]")


@dataclass(kw_only=True)
class ExpertsConfig(Section):
    """The weights of the experts and the slabs that hold them."""

    section_name: ClassVar[str] = "experts"

    #: At a graft the pretrained experts go to the frozen slab.
    freeze_pretrained: bool = False
    #: Initial weights of experts: default (normal), orthogonal, sparse; pretrained is what a graft has (until they are
    #: loaded, such weights are default).
    init: str = "default"
    #: Standard deviation of initial entries in units of fan_in ** -0.5 (gain); None is the backbone's initializer_range
    #: for default, and 1 for the others. Experts that stay frozen never grow to a useful scale, so theirs matters.
    init_gain: float | None = None
    #: sparse: share of the entries that are zero.
    init_sparsity: float = 0.9
    #: Width of a tier's experts, in widths of the tier below; tier 0 has the backbone's.
    tier_factor: int = 4
    #: Highest tier that merges may make; 0 keeps every expert at the backbone's width.
    max_tier: int = 0
    #: Tiers whose experts are ternary, of 1.58 bits: absmean weights and 8-bit activations (arXiv:2402.17764).
    ternary_tiers: list[int] = dataclasses.field(default_factory=list)
    #: Living layers in which they are so; None is all of them.
    ternary_layers: list[int] | None = None
    #: Ternary experts are held as 1.6 bits a weight, for inference: what `model.pack_experts()` and its checkpoints
    #: say. A model built from scratch with it has experts of zeros.
    packed: bool = False
    #: A full slab grows to this multiple of its capacity (geometric growth keeps re-wrapping rare).
    growth_factor: float = 1.5
    #: A slab shrinks to its alive rows when fewer than this share of its slots are alive.
    shrink_below: float = 0.5
    #: Upper bound on the bytes of all expert weights, in MiB (2**20 bytes), all layers together; None is no bound.
    memory_budget_mib: float | None = None

    def validate(self) -> None:
        self.require_one_of("init", ("default", "orthogonal", "sparse", "pretrained"))
        self.require("init_gain", self.init_gain is None or self.init_gain > 0, "None or > 0")
        self.require("init_sparsity", 0 <= self.init_sparsity < 1, "in [0, 1)")
        self.require("tier_factor", self.tier_factor >= 2, ">= 2")
        self.require("max_tier", 0 <= self.max_tier < MOST_TIERS, f"from 0 to {MOST_TIERS - 1}")
        self.require("growth_factor", self.growth_factor > 1, "> 1")
        self.require("shrink_below", 0 <= self.shrink_below < 1, "in [0, 1)")
        self.require("memory_budget_mib", self.memory_budget_mib is None or self.memory_budget_mib > 0, "None or > 0")
        tiers, layers = self.ternary_tiers, self.ternary_layers
        self.require(
            "ternary_tiers",
            len(set(tiers)) == len(tiers) and all(0 <= tier < MOST_TIERS for tier in tiers),
            f"different tiers from 0 to {MOST_TIERS - 1}",
        )
        if layers is not None:
            ok = bool(layers) and len(set(layers)) == len(layers) and min(layers) >= 0
            self.require("ternary_layers", ok, "None or different living layers, from 0")
        self.require("packed", bool(tiers) or not self.packed, "False without ternary_tiers")

    def ternary_in(self, layer: int) -> frozenset[int]:
        """Tiers whose experts are ternary in a living layer."""
        here = self.ternary_layers is None or layer in self.ternary_layers
        return frozenset(self.ternary_tiers if here else ())

    def require_layers(self, living_layers: int) -> None:
        """Raise `ConfigurationError` if `ternary_layers` names a layer that a model of so many does not have."""
        missing = [layer for layer in self.ternary_layers or () if layer >= living_layers]
        self.require("ternary_layers", not missing, f"None or of the living layers 0..{living_layers - 1}")


@dataclass(kw_only=True)
class TrainableConfig(Section):
    """What takes gradients. Experts of the trainable slab always do, those of the frozen slab never."""

    section_name: ClassVar[str] = "trainable"

    embeddings: bool = True
    #: The head, where it is not tied to the embeddings.
    head: bool = True
    attention: bool = True
    norms: bool = True
    #: Shared experts, and the MLPs of layers without experts.
    mlps: bool = True
    #: Query networks, and the temperature where it is learned: both change the scores of every expert.
    query_networks: bool = True
    #: Keys of the trainable slab.
    keys: bool = True
    #: Keys of frozen experts. `frozen-graft` turns it off: there the old addresses are protected.
    frozen_keys: bool = True
    #: Synapses: what they share and, of the experts whose keys may train, expression vectors.
    synapses: bool = True


@dataclass(kw_only=True)
class VitalsConfig(Section):
    """What is measured per expert while training."""

    section_name: ClassVar[str] = "vitals"

    #: Decay per optimizer step of the moving averages (0.9 remembers about ten steps).
    decay: float = 0.9
    #: Optimizer steps between readings of the experts' gradients, of their norms and their conflict with earlier ones
    #: (each reads every gradient once); 0 is never.
    grad_norm_every: int = 50
    #: Optimizer steps between samples of tokens for interference and credited loss; 0 is never.
    signals_every: int = 10
    #: Tokens sampled per layer and forward pass of such a step, on each rank.
    signal_tokens: int = 64
    #: Optimizer steps between measurements of Φ (see phi.py): every measured expert runs on every sampled token; 0 is
    #: never.
    phi_every: int = 100
    #: Tokens per layer and forward pass of such a step, on each rank, and experts of a layer at most, the most loaded.
    phi_tokens: int = 32
    phi_experts: int = 64
    #: Decay of an expert's fast and slow average of the loss credited to it, per step that brings it credit.
    fast_decay: float = 0.9
    slow_decay: float = 0.99

    def validate(self) -> None:
        for name in ("decay", "fast_decay", "slow_decay"):
            self.require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("grad_norm_every", "signals_every", "phi_every"):
            self.require(name, getattr(self, name) >= 0, ">= 0")
        for name in ("signal_tokens", "phi_tokens"):
            self.require(name, getattr(self, name) >= 1, ">= 1")
        self.require("phi_experts", self.phi_experts >= 2, ">= 2")
        self.require("fast_decay", self.fast_decay < self.slow_decay, "< vitals.slow_decay")


@dataclass(kw_only=True)
class PlasticityConfig(Section):
    """Knowledge gravity (SOME): keys that move without gradients, by the queries that reach them and by their peers."""

    section_name: ClassVar[str] = "plasticity"

    #: Keys may move; the model keeps where they started and how much each expert was used.
    enabled: bool = False
    #: Keys consolidate after every optimizer step.
    training: bool = True
    #: Keys consolidate after every forward pass in evaluation mode without gradients, in `generate` too.
    inference: bool = False
    #: Plasticity rate: the pull of a query on the key of each expert it reached.
    alpha: float = 0.01
    #: Bonding rate: the pull between keys of experts that served one token together.
    beta: float = 0.001
    #: Switches of the forces, for ablations: query pull, peer pull, mass, dark energy.
    use_alpha: bool = True
    use_beta: bool = True
    use_inertia: bool = True
    use_decay: bool = True
    #: What makes an expert heavy: the count of its tokens, or ema, the moving average of its load (1.0 is balanced).
    usage: str = "count"
    #: Decay per consolidation of the moving average.
    usage_decay: float = 0.99
    #: A query pulls as it is, or as its direction, scaled to the length of the key it pulls.
    pull: str = "raw"
    #: Dark energy: decay of unused keys, or a constant repulsion of all keys from the centroid of the others.
    dark_energy: str = "decay"
    #: repulsion: length of each key's step away from the centroid of the others, per consolidation.
    repulsion: float = 0.001
    #: decay: keys decay while the moving average of their load is below this (multiples of the uniform share).
    forgetting_threshold: float = 0.05
    #: decay: share of the way to its target that a key goes per consolidation.
    decay_rate: float = 0.001
    #: decay: keys go to their own start, or to the origin, where those forgotten together meet.
    decay_target: str = "start"
    #: Contrast: largest angle, radians per consolidation, by which keys of experts that serve other tokens turn away
    #: from each other (see plasticity/contrast.py), and the cosine up to which they are left alone; 0 radians is off.
    contrast: float = 0.0
    contrast_cosine: float = 0.3

    def validate(self) -> None:
        for name in ("alpha", "beta", "usage_decay", "decay_rate", "contrast", "contrast_cosine"):
            self.require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("repulsion", "forgetting_threshold"):
            self.require(name, getattr(self, name) >= 0, ">= 0")
        self.require_one_of("usage", ("count", "ema"))
        self.require_one_of("pull", ("raw", "direction"))
        self.require_one_of("dark_energy", ("decay", "repulsion"))
        self.require_one_of("decay_target", ("origin", "start"))


@dataclass(kw_only=True)
class SynapseConfig(Section):
    """Short-term memory of a router's and of attention's edges, and experts with two timescales (see synapse/).

    `router`: experts tire and are primed along a text. `attention`: keys do. `postsynaptic`: experts have fast weights
    that learn without gradients. Fields without a prefix hold for both kinds of edges, but for `chunk`.
    """

    section_name: ClassVar[str] = "synapse"

    #: Routers have synapses (see synapse/router.py).
    router: bool = False
    #: Tokens after which the state of a text's synapses advances; 1 is the exact recurrence, more is faster.
    chunk: int = 48
    #: Release in training: its expectation, or stochastic: whole vesicles on some edges. Else always the expectation.
    mode: str = "expectation"
    #: stochastic: share of the edges of a text that draw.
    stochastic_share: float = 0.12
    #: What scores hear of an edge that releases nothing, in units of the average release: log(epsilon).
    epsilon: float = 0.01
    #: First value of the learned strength; at 0 a graft is exact.
    strength: float = 0.0
    #: stochastic: with step and layer it determines every draw.
    seed: int = 0
    #: Weights of the auxiliary losses of routers' synapses: mean energy spent, and mean share of the docked vesicles
    #: that is gone (see synapse/router.py); 0 adds nothing.
    energy_loss_coef: float = 0.0
    pool_loss_coef: float = 0.0
    #: Experts have fast weights that learn from what they read without gradients (see synapse/postsynaptic.py).
    postsynaptic: bool = False
    #: What fast weights are multiplied by when experts compute; at 0 they are written and never read.
    postsynaptic_gain: float = 1.0
    #: Columns of the eligibility trace of each expert.
    postsynaptic_rank: int = 8
    #: Fast weights learn after every optimizer step.
    postsynaptic_training: bool = True
    #: Fast weights learn after every forward pass in evaluation mode without gradients.
    postsynaptic_inference: bool = False
    #: What one token writes, as a share of its expert's own output: while training, and while reading plastically.
    postsynaptic_rate: float = 0.0015
    postsynaptic_plastic_rate: float = 0.1
    #: Decay of gains and of traces, per step that brings an expert tokens.
    postsynaptic_fast_decay: float = 0.95
    postsynaptic_trace_decay: float = 0.96
    #: Share of the fast weights that becomes slow per step where CaMKII is fully active, without BDNF; what BDNF, which
    #: is at most 0.5, adds to it.
    postsynaptic_slow_rate: float = 0.02
    postsynaptic_bdnf: float = 1.0
    #: Calcium, in multiples of a layer's mean, above which CaMKII and below which PP1 is called for.
    postsynaptic_camkii_threshold: float = 1.0
    postsynaptic_pp1_threshold: float = 0.7
    #: Tokens per layer and forward pass of training, on each rank, that fast weights learn from.
    postsynaptic_tokens: int = 64
    #: Attention has synapses, attn_implementation "synaptic" (see synapse/attention.py).
    attention: bool = False
    #: Keys that a query drives, per head.
    attention_top_k: int = 8
    #: As `chunk`, of the edges of attention; at most half of `attention_turn` keeps it close to the exact recurrence.
    attention_chunk: int = 32
    #: Tokens that the edges of attention take for what those of a router do in one turn: to refill, to gather energy.
    attention_turn: float = 128.0
    #: What logits hear less of a key at an infinite distance, in nats, times septin and strength; and the distance at
    #: which it is half of that, in tokens.
    attention_barrier: float = 0.7
    attention_barrier_length: float = 256.0

    def validate(self) -> None:
        self.require("chunk", 1 <= self.chunk <= 4096, "from 1 to 4096")
        self.require_one_of("mode", ("expectation", "stochastic"))
        self.require("stochastic_share", 0 < self.stochastic_share <= 1, "in (0, 1]")
        self.require("epsilon", 1e-6 <= self.epsilon <= 1, "in [1e-6, 1]")
        self.require("strength", abs(self.strength) <= 10, "from -10 to 10")
        self.require("seed", self.seed >= 0, ">= 0")
        for name in ("energy_loss_coef", "pool_loss_coef"):
            value = getattr(self, name)
            self.require(name, value >= 0, ">= 0")
            self.require(name, self.router or not value, "0 without synapse.router, whose energy and vesicles it is of")
        self.require("postsynaptic_gain", 0 <= self.postsynaptic_gain <= 1, "in [0, 1]")
        for name in ("rank", "tokens"):
            self.require(f"postsynaptic_{name}", getattr(self, f"postsynaptic_{name}") >= 1, ">= 1")
        for name in ("rate", "plastic_rate", "slow_rate"):
            self.require(f"postsynaptic_{name}", 0 <= getattr(self, f"postsynaptic_{name}") <= 1, "in [0, 1]")
        for name in ("fast_decay", "trace_decay"):
            self.require(f"postsynaptic_{name}", 0 <= getattr(self, f"postsynaptic_{name}") < 1, "in [0, 1)")
        self.require("postsynaptic_bdnf", self.postsynaptic_bdnf >= 0, ">= 0")
        low, high = self.postsynaptic_pp1_threshold, self.postsynaptic_camkii_threshold
        self.require("postsynaptic_pp1_threshold", 0 <= low <= high, "in [0, synapse.postsynaptic_camkii_threshold]")
        self.require("attention_top_k", self.attention_top_k >= 1, ">= 1")
        self.require("attention_chunk", 1 <= self.attention_chunk <= 4096, "from 1 to 4096")
        self.require("attention_turn", 1 <= self.attention_turn <= 1e6, "from 1 to 1e6")
        self.require("attention_barrier", 0 <= self.attention_barrier <= 10, "from 0 to 10")
        self.require("attention_barrier_length", self.attention_barrier_length > 0, "> 0")


#: Newborn receptive fields a model may have.
MOST_FIELDS = 64


@dataclass(kw_only=True)
class ReceptiveFieldConfig(Section):
    """Receptive fields of newborn clades: a causal context gate, and the low-rank deltas that open with it."""

    section_name: ClassVar[str] = "receptive_field"

    #: Newborns live in a field of their own and are invisible outside it.
    enabled: bool = False
    #: Decay per token of the running mean of the log likelihood ratio (0.97 remembers about thirty tokens).
    decay: float = 0.97
    #: The gate opens above 0 and above this quantile of the evidence on calibration text: at most 1 - quantile of old
    #: tokens leave the root field. Higher protects more of what is old, lower opens more of a near new domain.
    quantile: float = 0.97
    #: Pseudo-count, in tokens, of the old density inside the new one: a new field starts as the old one and departs.
    prior_tokens: float = 2000.0
    #: Calibration tokens kept in the model to place the threshold again as the new density grows (never trained on).
    calibration_tokens: int = 65536
    #: Newborn fields at most. A new one is born when text comes that none explains; what comes after the last goes to
    #: the nearest.
    max_fields: int = 8
    #: Standard deviations below a field's own text at which it no longer explains a piece of 128 training tokens.
    novelty: float = 3.0
    #: Training tokens a newborn field takes before the next may be born.
    field_tokens: int = 32768
    #: Rank of the deltas on attention projections (0 is none).
    attention_rank: int = 64
    #: Rank of the delta on the language-model head (0 is none).
    head_rank: int = 128

    def validate(self) -> None:
        self.require("decay", 0 <= self.decay < 1, "in [0, 1)")
        self.require("quantile", 0.5 <= self.quantile <= 1, "in [0.5, 1]")
        self.require("prior_tokens", self.prior_tokens > 0, "> 0")
        self.require("calibration_tokens", self.calibration_tokens > 0, "> 0")
        self.require("max_fields", 1 <= self.max_fields <= MOST_FIELDS, f"from 1 to {MOST_FIELDS}")
        self.require("novelty", self.novelty > 0, "> 0")
        self.require("field_tokens", self.field_tokens > 0, "> 0")
        self.require("attention_rank", self.attention_rank >= 0, ">= 0")
        self.require("head_rank", self.head_rank >= 0, ">= 0")


@dataclass(kw_only=True)
class LifecycleConfig(Section):
    """When experts split and die. Loads are multiples of the uniform share (1.0 is a balanced layer)."""

    section_name: ClassVar[str] = "lifecycle"

    #: `model.lifecycle_step` proposes events; off, the model trains like its source.
    enabled: bool = True
    #: Name of the policy (see lifecycle/policies).
    policy: str = "load"
    #: Optimizer steps between decisions.
    interval: int = 10
    #: Optimizer steps before the first decision.
    warmup_steps: int = 20
    #: A layer rests this many steps after an event of its own.
    cooldown_steps: int = 10
    #: A newborn can neither die nor split before this age, in steps.
    min_age_steps: int = 50
    #: Decisions in a row that must agree before an event (hysteresis).
    patience: int = 2
    #: Split above this load; `darwinian`: above this vitality (see lifecycle/vitality.py), as below for deaths.
    split_load: float = 1.6
    #: Remove below this load. The deaths of one lifecycle step together displace at most as much: a starved expert is
    #: still the best one for the few tokens it serves, and the loss jumps by what it took to serve them.
    death_load: float = 0.02
    #: darwinian: share of the gradient signal in an expert's vitality; the rest is its load.
    vitality_gradient: float = 0.5
    #: darwinian: no births while the average loss improves by less than this share of itself in 1,000 steps; None is no
    #: such cap.
    cap_improvement: float | None = None
    #: In a layer whose Φ is below this share of its running maximum the most loaded expert splits, with mutation
    #: (`noise_std`), once for each collapse; None is never.
    phi_trigger: float | None = None
    #: A frozen expert that cannot learn splits when the load of tokens outside its field is above this.
    adapt_load: float = 0.25
    #: Minimum age, patience and cooldown grow with this power of an expert's width.
    lifetime_exponent: float = 0.5
    #: self_preservation: an expert is being cannibalised where the fast average of its tokens' loss is above the slow
    #: one by this many nats, and the others pull the mixture from its output by more than `split_interference` times
    #: the length of that, or its gradients run against their running direction (cosine below `split_conflict`).
    split_divergence: float = 0.05
    split_interference: float = 0.5
    split_conflict: float = -0.1
    #: self_preservation: steps for which the preserver of a split stays frozen, times its load (at most fourfold).
    preserve_steps: int = 100
    #: self_preservation: experts below this load are weak; two weak ones of which at least this share of the tokens of
    #: one reach both are fragments, and merge. Strong ones below the highest tier do at `gravity_coactivation`.
    merge_load: float = 0.5
    merge_coactivation: float = 0.5
    gravity_coactivation: float = 0.8
    #: self_preservation: share of `experts.memory_budget_mib` from which on the weakest merge whatever they serve.
    memory_pressure: float = 0.9
    #: synaptic_health: healths (see policies/health.py) at which an overloaded expert splits, and one that was less
    #: healthy for `patience` decisions dies, with half of `hazard`; and below which two may merge.
    split_health: float = 0.5
    death_health: float = 0.1
    merge_health: float = 0.3
    #: synaptic_health: least cosine of the keys of two experts that may merge.
    merge_cosine: float = 0.6
    #: synaptic_health: greatest probability of an event per decision, and how steeply it changes with health.
    hazard: float = 0.25
    health_slope: float = 12.0
    #: Siblings may not merge back for this many steps after their split.
    sibling_merge_bar_steps: int = 500
    #: Most events of one lifecycle step, all layers together.
    max_events_per_step: int = 4
    #: Fewest experts of a layer the policy leaves; None is the backbone's number of experts per token plus one.
    min_experts: int | None = None
    #: Most experts of a layer; None is no bound.
    max_experts: int | None = None
    #: Mutation noise of a newborn, relative to each weight tensor's RMS; 0 is an exact copy.
    noise_std: float = 0.0
    #: While new data arrives and experts protect themselves (phases 2 and 3 of the drift detector), policies that watch
    #: for cannibalisation divide their thresholds by this; 1 never tightens them.
    drift_vigilance: float = 1.5
    #: Seed of mutation noise, of chances and of tie breaks; with (step, layer, uid) it determines every event.
    seed: int = 0

    def validate(self) -> None:
        for name in ("interval", "max_events_per_step", "patience"):
            self.require(name, getattr(self, name) >= 1, ">= 1")
        for name in ("warmup_steps", "cooldown_steps", "min_age_steps", "sibling_merge_bar_steps", "seed"):
            self.require(name, getattr(self, name) >= 0, ">= 0")
        self.require("noise_std", self.noise_std >= 0, ">= 0")
        self.require("drift_vigilance", self.drift_vigilance >= 1, ">= 1")
        self.require("death_load", 0 <= self.death_load, ">= 0")
        self.require("adapt_load", 0 <= self.adapt_load, ">= 0")
        self.require("vitality_gradient", 0 <= self.vitality_gradient <= 1, "in [0, 1]")
        self.require("preserve_steps", self.preserve_steps >= 0, ">= 0")
        for name in ("lifetime_exponent", "split_divergence", "split_interference", "merge_load"):
            self.require(name, getattr(self, name) >= 0, ">= 0")
        for name in ("split_health", "merge_health", "death_health"):
            self.require(name, 0 < getattr(self, name) < 1, "in (0, 1), where healths are")
        low, high = self.death_health, self.split_health
        self.require(
            "merge_health", low <= self.merge_health <= high, f"from death_health {low} to split_health {high}"
        )
        self.require("merge_cosine", -1 <= self.merge_cosine < 1, "in [-1, 1)")
        self.require("hazard", 0 < self.hazard <= 1, "in (0, 1]")
        self.require("health_slope", self.health_slope >= 0, ">= 0")
        self.require("split_conflict", -1 <= self.split_conflict <= 1, "in [-1, 1]")
        for name in ("merge_coactivation", "gravity_coactivation", "memory_pressure"):
            self.require(name, 0 < getattr(self, name) <= 1, "in (0, 1]")
        self.require("split_load", self.split_load > 2 * self.death_load, "> 2 * lifecycle.death_load (hysteresis)")
        trigger = self.phi_trigger
        self.require("phi_trigger", trigger is None or 0 < trigger <= 1, "None or in (0, 1]")
        self.require(
            "phi_trigger",
            trigger is None or self.noise_std > 0,
            "None while lifecycle.noise_std is 0: a newborn that is an exact copy lowers Φ further",
        )
        self.require("min_experts", self.min_experts is None or self.min_experts >= 1, "None or >= 1")
        floor = self.min_experts or 1
        self.require("max_experts", self.max_experts is None or self.max_experts >= floor, f"None or >= {floor}")


@dataclass(kw_only=True)
class EscapeConfig(Section):
    """Topological escape: blocks that stagnate work in another space for a time (see escape/)."""

    section_name: ClassVar[str] = "escape"

    #: Where to: none (no parameters), poincare (a ball of learned curvature), fourier (frequencies of the features).
    space: str = "none"
    #: Optimizer steps of a window; the trend of loss and gradient norm is the change of their means between two.
    window: int = 200
    #: Windows in a row whose trends must be flat for training to stagnate.
    patience: int = 2
    #: Relative changes between windows that are no trend.
    loss_tolerance: float = 0.01
    grad_tolerance: float = 0.1
    #: Φ of a layer has collapsed when its moving average is below this share of its running maximum. Exact copies of
    #: all experts of a layer of 8 lower Φ to 0.87, so much smaller shares are never reached.
    collapse: float = 0.9
    #: A block leaves when the loss falls again, or after so many optimizer steps.
    max_steps: int = 2000
    #: Steps over which the gate of a block that leaves fades out.
    leave_steps: int = 200
    #: Steps after closing before the block may go again.
    rest_steps: int = 1000
    #: poincare: c at the start, for curvature -c.
    curvature: float = 1.0

    def validate(self) -> None:
        self.require_one_of("space", ("none", "poincare", "fourier"))
        for name in ("window", "patience", "max_steps", "leave_steps"):
            self.require(name, getattr(self, name) >= 1, ">= 1")
        for name in ("loss_tolerance", "grad_tolerance", "rest_steps"):
            self.require(name, getattr(self, name) >= 0, ">= 0")
        self.require("collapse", 0 < self.collapse <= 1, "in (0, 1]")
        self.require("curvature", 1e-3 <= self.curvature <= 1e3, "from 0.001 to 1000")

    @property
    def enabled(self) -> bool:
        return self.space != "none"


#: The sections of a `LivingMoeConfig`, by the name of the field that holds each.
SECTIONS: dict[str, type[Section]] = {
    section.section_name: section
    for section in (
        RouterConfig,
        ExpertsConfig,
        TrainableConfig,
        VitalsConfig,
        PlasticityConfig,
        ReceptiveFieldConfig,
        LifecycleConfig,
        EscapeConfig,
        SynapseConfig,
    )
}
