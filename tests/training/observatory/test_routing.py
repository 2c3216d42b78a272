"""Who serves a prompt: what the layers chose, told by uid, without a trace in the model."""

from pathlib import Path

import pytest
import torch
from factories import save_with_words, token_ids
from lives import busy_model

from living_moe.configuration.errors import LivingMoeError, TrainingError
from living_moe.training.observatory import routing
from living_moe.training.observatory.performance import read
from living_moe.training.observatory.routing import PromptReader, who_serves


@pytest.mark.parametrize("preset", ["grow", "frozen-graft", "synaptic-router"])
def test_every_token_s_experts_are_those_its_layers_chose_and_nothing_is_left_behind(preset: str) -> None:
    model = busy_model(preset)
    # Uids are not places: one in the middle is gone.
    model.split_expert(0, 2)
    if preset == "grow":
        model.remove_expert(0, 1)
    ids = token_ids(1, 12, high=60)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = who_serves(model, ids[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    reading = read(model, ids)
    for layer, served in enumerate(found):
        uids = model.expert_uids(layer)
        for token in range(12):
            pairs = zip(reading.index[layer][0, token].tolist(), reading.weights[layer][0, token].tolist(), strict=True)
            expected = {uids[index]: weight for index, weight in pairs if index >= 0}
            shown = dict(zip(served.uid_SK[token].tolist(), served.weight_SK[token].tolist(), strict=True))
            assert shown == pytest.approx(expected)
            assert list(shown.values()) == sorted(shown.values(), reverse=True)


def test_a_prompt_is_read_by_the_newest_model_of_a_run(tmp_path: Path) -> None:
    model = busy_model()
    reader = PromptReader(tmp_path)
    with pytest.raises(TrainingError, match="has no saved model yet"):
        reader("w1")
    save_with_words(model, tmp_path / "checkpoint-9")
    found = reader("w5 w6 w7")
    assert (found["model"], found["tokens"], found["cut"]) == ("checkpoint-9", ["w5", "w6", "w7"], 0)
    assert [len(layer) for layer in found["layers"]] == [3, 3]
    assert sum(weight for _, weight in found["layers"][0][0]) == pytest.approx(1.0, abs=2e-3)
    newborn = model.split_expert(1, 0).children[0]
    for uid in model.expert_uids(1):
        if uid not in (0, newborn):
            model.freeze_expert(1, uid)
    save_with_words(model, tmp_path / "checkpoint-10")
    assert reader("w5")["model"] == "checkpoint-10"
    save_with_words(model, tmp_path / "final")
    assert reader("w5")["model"] == "final"


def test_long_prompts_are_cut_and_empty_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_with_words(busy_model(), tmp_path)
    reader = PromptReader(tmp_path)
    monkeypatch.setattr(routing, "MOST_TOKENS", 4)
    found = reader("w1 " * 7)
    assert len(found["tokens"]) == 4 == len(found["layers"][0]) and found["cut"] == 3
    with pytest.raises(TrainingError, match="no token"):
        reader("  ")


def test_what_cannot_read_a_prompt_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy_model().save_pretrained(tmp_path / "wordless")
    with pytest.raises(TrainingError, match="has no tokenizer"):
        PromptReader(tmp_path / "wordless")("w1")
    save_with_words(busy_model(), tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(LivingMoeError):
        PromptReader(tmp_path / "broken")("w1")
    reader = PromptReader(tmp_path / "wordless")
    monkeypatch.setattr(routing, "PATIENCE", 0.01)
    with reader._lock, pytest.raises(TrainingError, match="another prompt"):
        reader("w1")
