"""Who serves a text: the experts that each layer chose for each of its tokens.

Reading leaves no trace in the model, as in performance.py. S tokens, K places.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from living_moe.configuration.errors import LivingMoeError, TrainingError
from living_moe.modeling_living_moe import LivingMoeForCausalLM
from living_moe.training.checkpointing import newest_model
from living_moe.training.observatory.leaderboard import shown_text
from living_moe.training.observatory.performance import pool_hook, undisturbed

#: Tokens of a prompt that are read.
MOST_TOKENS = 128
#: Seconds a prompt waits for another one to be read.
PATIENCE = 20.0


@dataclass(frozen=True)
class Served:
    """Who served one layer's tokens: uids int64 (S, K), -1 where a place is not used, and routing weights (S, K)."""

    uid_SK: Tensor
    weight_SK: Tensor


def who_serves(model: LivingMoeForCausalLM, ids_S: Tensor) -> list[Served]:
    """Per living layer who serves each token of a text, most weight first.

    Args:
        ids_S: int64 (S,), at least one.
    """
    chosen: list[tuple[Tensor, Tensor]] = []

    def keep(index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        chosen.append((index_TK.detach().cpu(), weights_TK.detach().float().cpu()))
        return weights_TK

    with undisturbed(model), ExitStack() as hooks:
        for block in model.living_blocks:
            hooks.enter_context(pool_hook(block, keep))
        model(input_ids=ids_S.unsqueeze(0).to(model.device), use_cache=False)
    found = []
    for block, (index_SK, weight_SK) in zip(model.living_blocks, chosen, strict=True):
        # The last row is for index -1: a place that is not used.
        uids = torch.tensor([*block.population.uids, -1])
        weight_SK, order_SK = weight_SK.masked_fill(index_SK < 0, 0.0).sort(dim=1, descending=True, stable=True)
        found.append(Served(uids[index_SK.long().gather(1, order_SK)], weight_SK))
    return found


class PromptReader:
    """Reads prompts with the newest saved model of a run: loaded for the first prompt, and when there is a newer one.

    Args:
        directory: Of a run or a checkpoint.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._lock = threading.Lock()
        self._seen: tuple[Path, int] | None = None
        self._model: LivingMoeForCausalLM | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def newest(self) -> Path | None:
        """The model that would read a prompt."""
        return newest_model(self.directory)

    def __call__(self, text: str) -> dict[str, Any]:
        """Plain values: `model`, `step`, `tokens` as text, `cut` (tokens left out), and `layers`.

        These hold, per layer and token, pairs of uid and weight, most weight first.

        Raises:
            TrainingError: There is no model yet, no tokenizer, nothing to read, or another prompt takes too long.
            LivingMoeError: The model is broken.
        """
        if not self._lock.acquire(timeout=PATIENCE):
            raise TrainingError("another prompt is being read; try again in a moment.")
        try:
            model, tokenizer = self._load()
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            if not ids:
                raise TrainingError("the prompt has no token; type some text.")
            kept = ids[: min(MOST_TOKENS, self._longest(model))]
            layers = who_serves(model, torch.tensor(kept))
            return {
                "model": self._seen[0].name if self._seen is not None else "",
                "step": model.steps_lived,
                "tokens": [shown_text([token], tokenizer) for token in kept],
                "cut": len(ids) - len(kept),
                "layers": [
                    [
                        [(uid, round(weight, 3)) for uid, weight in zip(uids, weights, strict=True) if uid >= 0]
                        for uids, weights in zip(served.uid_SK.tolist(), served.weight_SK.tolist(), strict=True)
                    ]
                    for served in layers
                ],
            }
        finally:
            self._lock.release()

    def _load(self) -> tuple[LivingMoeForCausalLM, PreTrainedTokenizerBase]:
        place = self.newest()
        if place is None:
            raise TrainingError(
                f"{self.directory.resolve().name} has no saved model yet (final or checkpoint-N) that could read a "
                f"prompt; train with --save-steps, or wait for the end."
            )
        try:
            seen = place, (place / "config.json").stat().st_mtime_ns
        except FileNotFoundError as error:
            raise TrainingError(f"{place.name} was just deleted; try again.") from error
        if seen != self._seen or self._model is None or self._tokenizer is None:
            # One model at a time in memory.
            self._seen = self._model = self._tokenizer = None
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(place)
            except (OSError, ValueError) as error:
                raise TrainingError(f"{place.name} has no tokenizer to read a prompt with: {error}") from error
            try:
                self._model = LivingMoeForCausalLM.from_pretrained(place).eval()
            except LivingMoeError:
                raise
            except (OSError, ValueError) as error:
                raise TrainingError(f"cannot read the model {place.name}: {error}") from error
            self._seen = seen
        return self._model, self._tokenizer

    @staticmethod
    def _longest(model: LivingMoeForCausalLM) -> int:
        return int(getattr(model.config.backbone_config, "max_position_embeddings", MOST_TOKENS))


__all__ = ["MOST_TOKENS", "PromptReader", "Served", "who_serves"]
