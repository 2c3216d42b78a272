"""Loaded weights lie where matrix products round as before saving."""

import copy
from pathlib import Path

import pytest
import torch
from factories import live, living_model, mixed_text, save_source, source_model
from safetensors.torch import load_file
from torch import Tensor, nn

import living_moe
from living_moe import LivingMoeForCausalLM
from living_moe.modeling_living_moe.alignment import ALIGNMENT, align, is_aligned


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def off_by(count: int, values: Tensor) -> Tensor:
    """The values as a view that starts `count` elements behind an aligned address."""
    memory = torch.empty(count + values.numel(), dtype=values.dtype)
    assert memory.data_ptr() % ALIGNMENT == 0
    return memory[count:].view_as(values).copy_(values)


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_a_loaded_model_is_aligned_though_its_file_is_not(preset: str, tmp_path: Path) -> None:
    model = living_model("mixtral", preset)
    live(model, 6)
    model.save_pretrained(tmp_path)
    assert not all(map(is_aligned, load_file(tmp_path / "model.safetensors").values()))
    loaded = LivingMoeForCausalLM.from_pretrained(tmp_path)
    assert all(map(is_aligned, tensors_of(loaded).values()))
    saved = model.compact_state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())


def test_a_converted_checkpoint_is_aligned(tmp_path: Path) -> None:
    save_source(source_model("mixtral"), tmp_path / "source")
    living = living_moe.convert(tmp_path / "source")
    assert all(map(is_aligned, tensors_of(living).values()))


def test_align_keeps_parameters_ties_and_values_and_what_lies_well() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 5), "head": nn.Linear(5, 7, bias=False), "norm": nn.RMSNorm(5)})
    model["embed"].weight.data = off_by(3, model["embed"].weight.data)
    model["head"].weight = model["embed"].weight
    model.register_buffer("count", off_by(1, torch.arange(3)))
    before = copy.deepcopy(model.state_dict())
    embed, place = model["embed"].weight, model["norm"].weight.data_ptr()
    assert not is_aligned(embed) and not is_aligned(model.count)
    align(model)
    assert all(map(is_aligned, tensors_of(model).values()))
    assert model["embed"].weight is embed and model["head"].weight is embed
    assert model["norm"].weight.data_ptr() == place
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_was_loaded_in_inference_mode_can_train(tmp_path: Path) -> None:
    living_model("mixtral").save_pretrained(tmp_path)
    with torch.inference_mode():
        model = LivingMoeForCausalLM.from_pretrained(tmp_path).train()
    ids = mixed_text(2, 8)
    model(ids, labels=ids).loss.backward()


def test_tensors_without_memory_here_are_left_alone() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    align(model)
    assert model.weight.is_meta
