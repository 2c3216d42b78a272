"""Collapse of routing, as a metric module of `evaluate`: loaded by path, so no network is needed.

Measures of `living_moe.training.collapse` on the experts that tokens chose.
"""

from typing import Any

import datasets
import evaluate
import numpy as np

from living_moe.configuration.errors import TrainingError
from living_moe.training.collapse import load_of_choices, measures_of_load


class RoutingCollapse(evaluate.Metric):
    """Counts choices, of any number of batches, before it measures their distribution over experts."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Gini coefficient, effective experts, MaxVio and share of dead experts.",
            citation="",
            inputs_description="predictions: chosen experts. num_experts, or else references: how many experts are.",
            features=datasets.Features({"predictions": datasets.Value("int64")}),
        )

    def compute(
        self, *, predictions: Any = None, references: Any = None, num_experts: int | None = None, **kwargs: Any
    ) -> dict[str, float] | None:
        """`references`, the number of experts once or many times over, says the same as `num_experts`.

        Args:
            predictions: Chosen experts, integers (N,); choices of top-k flattened.
            threshold: Experts are dead at a load of at most so many uniform shares; default 0.

        Raises:
            TrainingError: The number of experts is missing or ambiguous; a chosen expert is not in [0, num_experts).
        """
        said = set() if references is None else {int(number) for number in np.ravel(references)}
        if num_experts is not None:
            said.add(num_experts)
        if len(said) != 1:
            raise TrainingError(
                f"the number of experts is {'missing' if not said else sorted(said)}; give num_experts, one number "
                f"that includes the experts nobody chose."
            )
        result: dict[str, float] | None = super().compute(predictions=predictions, num_experts=said.pop(), **kwargs)
        return result

    def _compute(self, predictions: list[int], num_experts: int, threshold: float = 0.0) -> dict[str, float]:
        """`measures_of_load` of the counted choices."""
        return measures_of_load(load_of_choices(predictions, num_experts), threshold)
