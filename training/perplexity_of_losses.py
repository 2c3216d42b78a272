"""Perplexity from summed losses, as a metric module of `evaluate`: loaded by path, so no network is needed.

exp(total negative log likelihood / total tokens); Jelinek et al. 1977 (J. Acoust. Soc. Am. 62, S63).
"""

import math

import datasets
import evaluate


class PerplexityOfLosses(evaluate.Metric):
    """Adds up partial sums (of batches, files or processes) before it exponentiates."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity of a language model from sums of token losses.",
            citation="",
            inputs_description="predictions: summed losses in nats. references: how many tokens each sum has.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        """`loss` in nats per token, and `perplexity` (infinite where it exceeds what a float holds)."""
        loss = math.fsum(predictions) / sum(references)
        return {"loss": loss, "perplexity": math.inf if loss > 700 else math.exp(loss)}
