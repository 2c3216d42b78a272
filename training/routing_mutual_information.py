"""Mutual information of experts and token classes, as a metric module of `evaluate`: loaded by path, without network.

See `living_moe.training.collapse.routing_mutual_information`; needs scikit-learn.
"""

import datasets
import evaluate

from living_moe.training.collapse import routing_mutual_information


class RoutingMutualInformation(evaluate.Metric):
    """Collects choices and classes, of any number of batches, before it compares them."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mutual information between the chosen expert and the class of the token.",
            citation="",
            inputs_description="predictions: chosen experts. references: class of the token of each choice.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int], normalised: bool = True) -> dict[str, float]:
        """`routing_mutual_information`: adjusted for chance, or plain in nats."""
        return {"routing_mutual_information": routing_mutual_information(predictions, references, normalised)}
