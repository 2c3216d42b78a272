"""Has routing collapsed onto few experts? Measures of loads, keys and choices.

Loads: Gini coefficient, effective experts (the exponential of Shannon's entropy, Hill 1973), MaxVio (Wang et al. 2024,
arXiv:2408.15664), share of dead experts. All four are blind to the unit of the load (tokens, shares, multiples of the
uniform share) and to the order of the experts. Loads of nothing but zeros, a layer that has seen no token, read as
balanced: no evidence of collapse. Keys: silhouette (Rousseeuw 1987). Choices: mutual information with the token's class
(adjusted for chance, Vinh et al. 2010). The last two need scikit-learn, an optional extra.

A token has K places, each for another expert, so under top-k a collapsed layer still loads K experts alike: effective
experts end at K, not at 1. Experts are counted, not clades: a split halves a load and thereby changes all measures.

Reads models, changes nothing. E alive experts in slot order, D length of a key, N choices, V vocabulary.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from living_moe.configuration.errors import ConfigurationError, TrainingError

Array: TypeAlias = "npt.ArrayLike | Tensor"

#: Metrics of `evaluate`, to be loaded by path: `evaluate.load(str(COLLAPSE_METRIC))`.
COLLAPSE_METRIC = Path(__file__).with_name("routing_collapse.py")
MUTUAL_INFORMATION_METRIC = Path(__file__).with_name("routing_mutual_information.py")
#: Multiples of the uniform share. A moving average never comes down to zero; default of `lifecycle.death_load`.
DEAD_LOAD = 0.02
#: Most clusters that k-means looks for among keys.
MAX_CLUSTERS = 10
#: Names of the classes that `token_classes` tells apart; a class is the index of its name.
TOKEN_CLASSES = (
    "whitespace", "word_lower", "word_upper", "continuation", "digits", "punctuation", "operator", "other",
)  # fmt: skip
_OPERATORS = frozenset("()[]{}<>+-*/%=&|^~@#$\\")


# -- loads -------------------------------------------------------------------------------------------------------------


def gini(load_E: Array) -> float:
    """Gini coefficient of the loads: 0 where all are equal, 1 - 1/E where one expert takes all.

    Args:
        load_E: Shape (E,), any unit, >= 0.

    Raises:
        TrainingError: No experts, or a load that is negative, NaN or infinite. All measures of loads raise it.
    """
    relative_E = _relative(load_E)
    count = len(relative_E)
    ranks_E = np.arange(1, count + 1)
    value = float(((2 * ranks_E - count - 1) * relative_E).sum()) / count**2
    return min(max(value, 0.0), 1.0 - 1.0 / count)


def shannon_entropy(load_E: Array) -> float:
    """Entropy of the share of load that each expert takes, in nats: 0 (one takes all) to ln E (all equal)."""
    relative_E = _relative(load_E)
    shares_E = relative_E[relative_E > 0] / len(relative_E)
    return min(max(float(-(shares_E * np.log(shares_E)).sum()), 0.0), math.log(len(relative_E)))


def effective_experts(load_E: Array) -> float:
    """How many equally loaded experts would have the same entropy: 1 (one takes all) to E (all equal)."""
    return math.exp(shannon_entropy(load_E))


def max_violation(load_E: Array) -> float:
    """MaxVio, (largest load - mean) / mean: 0 (all equal) to E - 1 (one takes all). Wang et al. 2024."""
    return max(float(_relative(load_E)[-1]) - 1.0, 0.0)


def dead_share(load_E: Array, threshold: float = 0.0) -> float:
    """Share of the experts, 0 to 1, whose load is at most `threshold` times the uniform share.

    Args:
        load_E: Shape (E,), any unit, >= 0.
        threshold: >= 0; 0 counts experts without any token. Moving averages need more (`DEAD_LOAD`).
    """
    if not threshold >= 0:
        raise TrainingError(f"threshold is {threshold}; give a multiple of the uniform share, >= 0.")
    return float((_relative(load_E) <= threshold).mean())


def measures_of_load(load_E: Array, threshold: float = 0.0) -> dict[str, float]:
    """gini, effective_experts, effective_share (effective_experts / E), max_violation and dead_share of one layer."""
    load_E = _host(load_E)
    effective = effective_experts(load_E)
    return {
        "gini": gini(load_E),
        "effective_experts": effective,
        "effective_share": effective / len(load_E),
        "max_violation": max_violation(load_E),
        "dead_share": dead_share(load_E, threshold),
    }


def load_of_choices(experts: Array, num_experts: int) -> npt.NDArray[np.int64]:
    """Choices per expert, int64 (E,).

    Args:
        experts: Indices in [0, num_experts), any shape, such as (T, K).
        num_experts: E, those that nobody chose included.

    Raises:
        TrainingError: There are no choices, or one is no index of an expert.
    """
    index_N = _labels(experts, "experts")
    if index_N.max() >= num_experts:
        raise TrainingError(f"expert {index_N.max()} was chosen, but num_experts is {num_experts}; it counts them all.")
    return np.bincount(index_N, minlength=num_experts).astype(np.int64)


def collapse_report(model: nn.Module, *, threshold: float = DEAD_LOAD) -> list[dict[str, float]]:
    """`measures_of_load` of each living layer, from the moving averages of its vitals.

    One transfer from the device, whatever the number of layers. The same on every rank.

    Args:
        model: A living model.
        threshold: Experts are dead at a load of at most so many uniform shares.

    Raises:
        TrainingError: The model does not live.
    """
    blocks: Any = getattr(model, "living_blocks", None)
    if not blocks:
        raise TrainingError(f"{type(model).__name__} has no living layers; convert it first (living_moe.convert).")
    # In slot order, as `model.vitals(layer)["load"]`, which would copy the other columns as well.
    loads = [
        block.vitals.table(slab).load[:count] for block in blocks for slab, count in block.population.alive.items()
    ]
    # Layers may be spread over devices.
    host: list[float] = torch.cat([load.to(loads[0].device) for load in loads]).tolist()
    counts = [len(block.population.members) for block in blocks]
    return [
        measures_of_load(host[end - count : end], threshold)
        for end, count in zip(accumulate(counts), counts, strict=True)
    ]


def summary(report: Sequence[dict[str, float]], prefix: str = "routing/") -> dict[str, float]:
    """Means over layers of a `collapse_report`, by names for loggers such as "routing/gini"."""
    return {f"{prefix}{name}": math.fsum(layer[name] for layer in report) / len(report) for name in report[0]}


# -- keys --------------------------------------------------------------------------------------------------------------


def key_silhouette(keys_ED: Array, labels_E: Array | None = None, seed: int = 0) -> float:
    """How clearly keys fall into groups: mean silhouette under cosine distance, -1 to 1.

    Near 1 keys sit tight in groups far from each other (experts of a group are interchangeable addresses), near 0
    groups overlap, below 0 keys are nearer to another group. Keys that all point one way have silhouette 0; a key of
    zeros is as far from all others as an orthogonal one.

    Args:
        keys_ED: Shape (E, D), such as `block.router.keys(block.population.alive)`.
        labels_E: Group of each key, integers (E,), such as clades: 2 to E - 1 different ones. None: clusters of k-means
            on the directions of the keys, k of 2..min(10, E - 1) by best silhouette. Being the best of several, that is
            above 0 for random keys too: compare it with the value before training.
        seed: Of k-means.

    Raises:
        ConfigurationError: scikit-learn is not installed.
        TrainingError: Keys are not finite or of another shape, too few, or the labels do not divide them.
    """
    keys = _host(keys_ED)
    if keys.ndim != 2 or not keys.size or not np.isfinite(keys).all():
        raise TrainingError(f"keys of shape {keys.shape} have no silhouette; give finite numbers of shape (E, D).")
    directions_ED = keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    distances_EE = 1.0 - directions_ED @ directions_ED.T
    # Twins have one key; the rounding error of their distance must not count as structure.
    distances_EE[distances_EE < 1e-9] = 0.0
    np.fill_diagonal(distances_EE, 0.0)
    score = _sklearn("sklearn.metrics").silhouette_score
    if labels_E is not None:
        labels = _labels(labels_E, "labels")
        groups = len(np.unique(labels))
        if len(labels) != len(keys) or not 2 <= groups < len(keys):
            raise TrainingError(
                f"{len(labels)} labels with {groups} groups do not divide {len(keys)} keys; give one label per key and "
                f"2 to {len(keys) - 1} groups, or no labels."
            )
        return float(score(distances_EE, labels, metric="precomputed"))
    if len(keys) < 3:
        raise TrainingError(f"{len(keys)} keys have no clusters; a silhouette needs at least 3.")
    # k-means warns when asked for more clusters than there are different points.
    different = len(np.unique(directions_ED.round(6), axis=0))
    cluster = _sklearn("sklearn.cluster").KMeans
    best = -1.0 if different > 1 else 0.0
    for k in range(2, min(MAX_CLUSTERS, len(keys) - 1, different) + 1):
        labels = cluster(n_clusters=k, n_init=4, random_state=seed).fit_predict(directions_ED)
        best = max(best, float(score(distances_EE, labels, metric="precomputed")))
    return best


# -- choices -----------------------------------------------------------------------------------------------------------


def routing_mutual_information(expert_N: Array, token_class_N: Array, normalised: bool = True) -> float:
    """What the chosen expert tells about the token's class.

    Args:
        expert_N: Chosen experts, integers >= 0, shape (N,). For top-k, choices (T, K) flattened, each class K times.
        token_class_N: Class of each token, integers >= 0, shape (N,), such as `token_classes(tokenizer)[input_ids]`.
        normalised: Adjusted for chance (Vinh et al. 2010) and divided by the mean of both entropies: about 0 for
            independent choices, 1 if expert and class determine each other. Otherwise plain, in nats, 0 to the smaller
            entropy, and above 0 by chance when N is small.

    Returns:
        0 where all choices or all classes are the same (scikit-learn would call two constants a perfect match).

    Raises:
        ConfigurationError: scikit-learn is not installed.
        TrainingError: Lengths differ, or there is nothing, or a label that is negative or no integer.
    """
    experts, classes = _labels(expert_N, "experts"), _labels(token_class_N, "token classes")
    if len(experts) != len(classes):
        raise TrainingError(f"{len(experts)} experts but {len(classes)} token classes; give one class per choice.")
    metrics = _sklearn("sklearn.metrics")
    if (experts == experts[0]).all() or (classes == classes[0]).all():
        return 0.0
    measure = metrics.adjusted_mutual_info_score if normalised else metrics.mutual_info_score
    return float(measure(classes, experts))


def token_classes(tokenizer: Any) -> Tensor:
    """The class of every token by its text alone, a stand-in for its part of speech.

    whitespace (newlines too); word_lower and word_upper (a space, then a letter: the beginning of a word; scripts
    without case are lower); continuation (a letter or underscore without a space before it); digits; punctuation;
    operator (brackets, arithmetic and comparison signs); other (special tokens, incomplete characters, symbols).
    The first character that is no space decides. A word right after a newline counts as a continuation.

    Args:
        tokenizer: Of Transformers, of any kind: its own decoder says what a token's text is.

    Returns:
        int64 (V,), on the CPU: index in `TOKEN_CLASSES` by token id.
    """
    token_of = {index: token for token, index in tokenizer.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    # Decoders drop the space at the beginning of a text, so each token is decoded after another.
    anchor = tokenizer.tokenize("a")[-1:]
    before = tokenizer.convert_tokens_to_string(anchor) if anchor else ""

    def text_of(token: str) -> str:
        text: str = tokenizer.convert_tokens_to_string([*anchor, token])
        return text[len(before) :] if text.startswith(before) else tokenizer.convert_tokens_to_string([token])

    other = TOKEN_CLASSES.index("other")
    classes_V = torch.full((max(token_of) + 1,), other, dtype=torch.int64)
    for index, token in token_of.items():
        if index not in special:
            classes_V[index] = TOKEN_CLASSES.index(class_of_text(text_of(token)))
    return classes_V


def class_of_text(text: str) -> str:
    """The class of a token with this text, one of `TOKEN_CLASSES`."""
    stripped = text.lstrip()
    if not stripped:
        return "whitespace" if text else "other"
    first = stripped[0]
    if first.isalpha() or first == "_":
        if len(stripped) == len(text):
            return "continuation"
        return "word_upper" if first.isupper() or first.istitle() else "word_lower"
    if first.isnumeric():
        return "digits"
    if first in _OPERATORS:
        return "operator"
    return "punctuation" if unicodedata.category(first).startswith("P") else "other"


# -- inputs ------------------------------------------------------------------------------------------------------------


def _host(values: Array) -> npt.NDArray[np.float64]:
    """Numbers of any kind and place as float64 on the host."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()  # numpy has no bfloat16
    return np.asarray(values, dtype=np.float64)


def _relative(load_E: Array) -> npt.NDArray[np.float64]:
    """Loads in multiples of the uniform share, smallest first; ones if nothing was loaded."""
    load = _host(load_E)
    if load.ndim != 1 or not load.size:
        raise TrainingError(f"loads have shape {load.shape}; give one load for each of one or more experts, (E,).")
    if not (np.isfinite(load) & (load >= 0)).all():
        wrong = load[~(np.isfinite(load) & (load >= 0))][0]
        raise TrainingError(f"a load is {wrong}; loads are finite and >= 0, counts of tokens or shares of them.")
    if not load.any():
        return np.ones_like(load)
    # Sorted, so that the order of experts does not even change rounding; divided by the largest, so no sum overflows.
    load = np.sort(load) / load.max()
    return load * len(load) / load.sum()


def _labels(values: Array, name: str) -> npt.NDArray[np.int64]:
    """Labels as int64 (N,)."""
    labels = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    labels = labels.reshape(-1)
    if not labels.size:
        raise TrainingError(f"there are no {name}; give at least one.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        wrong = f"{labels.min()} among them" if np.issubdtype(labels.dtype, np.integer) else f"dtype {labels.dtype}"
        raise TrainingError(f"{name} have {wrong}; they are integers >= 0. Leave padding out.")
    return labels.astype(np.int64)


def _sklearn(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            "silhouette and mutual information need scikit-learn, which is not installed; run "
            "`pip install living_moe[analysis]`."
        ) from error


__all__ = [
    "COLLAPSE_METRIC",
    "DEAD_LOAD",
    "MUTUAL_INFORMATION_METRIC",
    "TOKEN_CLASSES",
    "class_of_text",
    "collapse_report",
    "dead_share",
    "effective_experts",
    "gini",
    "key_silhouette",
    "load_of_choices",
    "max_violation",
    "measures_of_load",
    "routing_mutual_information",
    "shannon_entropy",
    "summary",
    "token_classes",
]
