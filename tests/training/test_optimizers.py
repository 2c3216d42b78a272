"""LivingAdamW: torch's AdamW where every expert has tokens, a literal per-slot AdamW where not, isolation always."""

import copy
import ctypes
import itertools
import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from transformers import MixtralConfig, MixtralForCausalLM

import living_moe
from living_moe.configuration.errors import OptimizerError
from living_moe.training import malloc
from living_moe.training.malloc import tune_malloc
from living_moe.training.optimizers import ROLES, LivingAdamW, runs_of_equal_step

HYPERPARAMETERS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@dataclass(frozen=True)
class Slot:
    layer: int
    slab: str
    role: str
    parameter: nn.Parameter


class Slab(nn.Module):
    direct_grad = False

    def __init__(self, capacity: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(capacity, 4, 3))
        self.down_proj = nn.Parameter(torch.randn(capacity, 3, 2))
        self.key = nn.Parameter(torch.randn(capacity, 3))


class Population(nn.Module):
    """The protocol of a living model and nothing else: two layers, of 5 and of 3 slots."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7)
        self.norm = nn.LayerNorm(3)
        self.layers = nn.ModuleList([Slab(5), Slab(3)])
        self.population_version = 0
        self.tokens = [torch.zeros(5, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)]
        self.deltas = nn.ModuleList([nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)])
        self.field_tokens = torch.zeros(2, dtype=torch.int64)

    def counts_tokens(self, layer: int) -> bool:
        return self.training

    def slot_parameters(self) -> Iterator[Slot]:
        for layer, slab in enumerate(self.layers):
            for role in ("gate_up_proj", "down_proj", "key"):
                yield Slot(layer, "trainable", role, slab.get_parameter(role))

    def take_step_tokens(self) -> dict[tuple[int, str], Tensor]:
        taken = {(layer, "trainable"): tokens.clone() for layer, tokens in enumerate(self.tokens)}
        for tokens in self.tokens:
            tokens.zero_()
        return taken

    def field_parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        for field, delta in enumerate(self.deltas, start=1):
            yield field, delta.weight

    def require_unpacked(self) -> None:
        pass

    def take_step_fields(self) -> Tensor:
        taken = self.field_tokens.clone()
        self.field_tokens.zero_()
        return taken

    def set_gradients(self, rows: list[list[int]], seed: int) -> None:
        """Gradients as a backward pass leaves them whose tokens went to `rows`. Keys get theirs from all tokens."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        self.field_tokens += 1
        for layer, slab in enumerate(self.layers):
            self.tokens[layer][rows[layer]] += 1
            idle = [row for row in range(len(self.tokens[layer])) if row not in rows[layer]]
            slab.gate_up_proj.grad[idle] = 0
            slab.down_proj.grad[idle] = 0


ALL_ROWS = [list(range(5)), list(range(3))]


class LiteralAdamW:
    """AdamW as the paper writes it, one expert at a time, in fp64."""

    def __init__(self, parameters: list[Tensor], lr: float, betas: tuple[float, float], eps: float, decay: float):
        self.parameters = [parameter.detach().double() for parameter in parameters]
        self.m = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.v = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = [[0] * len(parameter) for parameter in self.parameters]
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, decay

    def step(self, grads: list[Tensor], rows: list[list[int]]) -> None:
        for p, m, v, steps, grad, touched in zip(self.parameters, self.m, self.v, self.steps, grads, rows, strict=True):
            for row in touched:
                steps[row] += 1
                g = grad[row].double()
                p[row] *= 1 - self.lr * self.decay
                m[row] = self.betas[0] * m[row] + (1 - self.betas[0]) * g
                v[row] = self.betas[1] * v[row] + (1 - self.betas[1]) * g * g
                m_hat = m[row] / (1 - self.betas[0] ** steps[row])
                v_hat = v[row] / (1 - self.betas[1] ** steps[row])
                p[row] -= self.lr * m_hat / (v_hat.sqrt() + self.eps)


@pytest.mark.parametrize("fused", [True, False])
def test_it_is_torchs_adamw_bit_for_bit_where_every_expert_has_tokens(fused: bool) -> None:
    ours, theirs = Population(), Population()
    theirs.load_state_dict(ours.state_dict())
    living = LivingAdamW(ours, **HYPERPARAMETERS, fused=fused)
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    plain = [p for p in theirs.parameters() if p.ndim == 1]
    torchs = torch.optim.AdamW(
        [{"params": decayed}, {"params": plain, "weight_decay": 0.0}], **HYPERPARAMETERS, fused=fused, foreach=not fused
    )
    for seed in range(6):
        for model, optimizer in ((ours, living), (theirs, torchs)):
            model.set_gradients(ALL_ROWS, seed)
            optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


ROWS = st.tuples(st.sets(st.integers(0, 4)), st.sets(st.integers(0, 2)))


@settings(max_examples=40)
@given(st.lists(ROWS, min_size=1, max_size=8), st.booleans())
def test_each_expert_steps_as_if_it_were_alone_and_idle_ones_keep_every_bit(
    history: list[tuple[set[int], set[int]]], fused: bool
) -> None:
    model = Population()
    optimizer = LivingAdamW(model, **HYPERPARAMETERS, fused=fused)
    slots = list(model.slot_parameters())
    values = [slot.parameter for slot in slots]
    literal = LiteralAdamW(values, 0.05, (0.8, 0.95), 1e-6, 0.1)
    model.set_gradients(ALL_ROWS, 99)
    literal.step([p.grad for p in values], [ALL_ROWS[slot.layer] for slot in slots])
    optimizer.step()
    for seed, touched in enumerate(history):
        rows = [sorted(layer) for layer in touched]
        before = [(p.detach().clone(), copy.deepcopy(optimizer.state[p])) for p in values]
        model.set_gradients(rows, seed)
        literal.step([p.grad for p in values], [rows[slot.layer] for slot in slots])
        optimizer.step()
        for slot, (value, state) in zip(slots, before, strict=True):
            idle = [row for row in range(len(value)) if row not in rows[slot.layer]]
            assert torch.equal(slot.parameter[idle], value[idle])
            for name, tensor in optimizer.state[slot.parameter].items():
                assert torch.equal(tensor[idle], state[name][idle])
    for parameter, expected, steps in zip(values, literal.parameters, literal.steps, strict=True):
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-5)
        assert optimizer.state[parameter]["step"].tolist() == steps


def test_deltas_of_a_field_without_tokens_keep_every_bit_whatever_gradient_they_have() -> None:
    """On several ranks DDP gives them one of zeros; momentum and weight decay would move them."""
    model = Population()
    optimizer = LivingAdamW(model, **HYPERPARAMETERS)
    model.set_gradients(ALL_ROWS, 0)
    optimizer.step()
    first, second = (delta.weight for delta in model.deltas)
    before = [(p.detach().clone(), copy.deepcopy(optimizer.state[p])) for p in (first, second)]
    model.set_gradients(ALL_ROWS, 1)
    model.field_tokens[0] = 0
    optimizer.step()
    assert torch.equal(first, before[0][0]) and not torch.equal(second, before[1][0])
    assert all(torch.equal(value, before[0][1][name]) for name, value in optimizer.state[first].items())
    assert int(optimizer.state[second]["step"]) == 2


def test_a_newborn_takes_a_first_step_of_one_learning_rate() -> None:
    model = Population()
    optimizer = LivingAdamW(model, lr=0.01, weight_decay=0.0)
    for seed in range(50):
        model.set_gradients([[0, 1], []], seed)
        optimizer.step()
    before = model.layers[0].down_proj.detach().clone()
    model.set_gradients([[4], []], 50)
    optimizer.step()
    moved = (model.layers[0].down_proj.detach() - before)[4].abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-3, atol=0)


def test_tokens_of_all_micro_batches_count() -> None:
    model = Population()
    optimizer = LivingAdamW(model)
    before = model.layers[0].key.detach().clone()
    model.set_gradients([[1], []], 0)
    model.set_gradients([[3], []], 1)
    optimizer.step()
    changed = (model.layers[0].key != before).any(dim=1).tolist()
    assert changed == [False, True, False, True, False]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=12))
def test_runs_cover_each_row_once_and_are_as_long_as_can_be(slots: list[tuple[bool, int]]) -> None:
    rows = [row for row, (touched, _) in enumerate(slots) if touched]
    steps = [float(step) for _, step in slots]
    runs = list(runs_of_equal_step(rows, steps))
    assert [row for first, length in runs for row in range(first, first + length)] == rows
    assert all(len({steps[row] for row in range(first, first + length)}) == 1 for first, length in runs)
    for (first, length), (following, _) in itertools.pairwise(runs):
        assert first + length < following or steps[first] != steps[following]


def test_groups_are_tagged_and_hold_every_trainable_parameter_once() -> None:
    model = Population()
    model.layers[1].requires_grad_(False)
    model.head.weight.requires_grad_(False)
    optimizer = LivingAdamW(model, weight_decay=0.3)
    groups = {group["role"]: group for group in optimizer.param_groups}
    assert tuple(groups) == ROLES
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert [p.ndim for p in groups["no_decay"]["params"]] == [1, 1, 1]
    assert groups["experts"]["params"] == [model.layers[0].gate_up_proj, model.layers[0].down_proj]
    assert [group["weight_decay"] for group in groups.values()] == [0.3, 0.0, 0.3, 0.3]
    without = LivingAdamW(model, decay_embeddings=False).param_groups
    assert without[0]["params"] == [delta.weight for delta in model.deltas] and any(
        p is model.embedding.weight for p in without[1]["params"]
    )


def test_hand_made_groups_step_lazily_with_the_model_and_plainly_without() -> None:
    model = Population()
    for given_model, expected in ((model, [False, True, False]), (None, [True, True, True])):
        optimizer = LivingAdamW([{"params": list(model.parameters()), "lr": 0.1}], model=given_model)
        before = model.layers[1].down_proj.detach().clone()
        model.set_gradients([[], [1]], 0)
        optimizer.step()
        assert (model.layers[1].down_proj != before).flatten(1).any(dim=1).tolist() == expected


def test_state_round_trips_bit_for_bit_and_training_goes_on_the_same() -> None:
    model = Population()
    optimizer = LivingAdamW(model, **HYPERPARAMETERS)
    history = [[[0, 1, 4], [2]], [[1], []], [[1, 2], [0, 2]], [[0, 1, 2, 3], [1]]]
    for seed, rows in enumerate(history[:2]):
        model.set_gradients(rows, seed)
        optimizer.step()
    twin = Population()
    twin.load_state_dict(model.state_dict())
    resumed = LivingAdamW(twin, lr=9.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["role"] for group in resumed.param_groups] == list(ROLES)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert optimizer.state[ours].keys() == resumed.state[theirs].keys()
        for name, tensor in optimizer.state[ours].items():
            assert torch.equal(tensor, resumed.state[theirs][name])
    for seed, rows in enumerate(history[2:]):
        for one, stepper in ((model, optimizer), (twin, resumed)):
            one.set_gradients(rows, seed)
            stepper.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_schedulers_clipping_and_closures_work() -> None:
    model = Population()
    optimizer = LivingAdamW(model, lr=1.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        model.set_gradients([[2], []], 0)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return torch.tensor(3.0)

    for rate in (1.0, 0.5):
        before = model.layers[0].down_proj.detach().clone()
        assert optimizer.step(closure) == 3.0
        scheduler.step()
        moved = (model.layers[0].down_proj.detach() - before)[2].abs()
        assert math.isclose(moved.max().item(), rate, rel_tol=1e-2)


def test_bf16_parameters_and_a_tensor_learning_rate_work() -> None:
    model = Population().bfloat16()
    optimizer = LivingAdamW(model, lr=torch.tensor(0.5))
    before = model.layers[1].key.detach().clone()
    model.set_gradients([[], [1]], 0)
    optimizer.step()
    assert (model.layers[1].key != before).any(dim=1).tolist() == [False, True, False]
    assert optimizer.state[model.layers[1].key]["step"].dtype == torch.float32


def test_parameters_without_a_gradient_are_skipped_and_get_no_state() -> None:
    model = Population()
    optimizer = LivingAdamW(model)
    model.set_gradients(ALL_ROWS, 0)
    model.head.weight.grad = None
    model.layers[0].down_proj.grad = None
    optimizer.step()
    assert model.head.weight not in optimizer.state and model.layers[0].down_proj not in optimizer.state
    assert model.layers[0].gate_up_proj in optimizer.state


def grow(model: Population, optimizer: LivingAdamW | None) -> None:
    """What an event does that gives the first layer two more slots."""
    slab = model.layers[0]
    for name, old in list(slab.named_parameters()):
        new = nn.Parameter(torch.cat([old.detach(), torch.ones(2, *old.shape[1:])]))
        setattr(slab, name, new)
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
            state = optimizer.state.pop(old)
            optimizer.state[new] = {n: torch.cat([t, torch.zeros(2, *t.shape[1:])]) for n, t in state.items()}
    model.tokens[0] = torch.zeros(7, dtype=torch.int64)
    model.population_version += 1


def test_it_follows_parameters_that_surgery_replaced() -> None:
    model = Population()
    optimizer = LivingAdamW(model)
    model.set_gradients(ALL_ROWS, 0)
    optimizer.step()
    grow(model, optimizer)
    for parameter in model.layers[0].parameters():
        before = parameter.detach().clone()
        model.set_gradients([[5], []], 1)
        optimizer.step()
        assert (parameter != before).flatten(1).any(dim=1).tolist() == [False] * 5 + [True, False]
        assert optimizer.state[parameter]["step"][5] > 0 and optimizer.state[parameter]["step"][6] == 0


def test_an_optimizer_built_before_a_slab_grew_is_refused() -> None:
    model = Population()
    optimizer = LivingAdamW(model)
    grow(model, None)
    with pytest.raises(OptimizerError, match="layer 0: gate_up_proj of the trainable slab is in no param group"):
        optimizer.step()


def test_state_of_another_population_is_refused_and_nothing_moves() -> None:
    model = Population()
    optimizer = LivingAdamW(model)
    model.set_gradients(ALL_ROWS, 0)
    optimizer.state[model.layers[0].key]["step"] = torch.zeros(6)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptimizerError, match=r"step counts of shape \(6,\).*needs \(5,\)"):
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_training_in_eval_mode_is_refused() -> None:
    model = Population()
    optimizer = LivingAdamW(model)
    model.set_gradients([[], []], 0)
    optimizer.step()  # in training mode a step without tokens is a step without experts
    model.eval()
    model.set_gradients([[], []], 1)
    with pytest.raises(OptimizerError, match=r"eval mode.*model\.train\(\)"):
        optimizer.step()


def test_sparse_gradients_are_refused() -> None:
    model = Population()
    model.embedding.sparse = True
    optimizer = LivingAdamW(model)
    model.embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(OptimizerError, match="sparse=False"):
        optimizer.step()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"eps": -1e-8}, "eps must be >= 0"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(setting: dict, message: str) -> None:
    with pytest.raises(OptimizerError, match=message):
        LivingAdamW(Population(), **setting)


def test_a_wrapped_model_and_a_model_without_trainable_parameters_are_refused() -> None:
    with pytest.raises(OptimizerError, match=r"DataParallel has no slot_parameters.*unwrap_model"):
        LivingAdamW(DataParallel(Population()))
    with pytest.raises(OptimizerError, match="nothing to train"):
        LivingAdamW(Population().requires_grad_(False))


def test_slabs_write_gradients_in_place_only_when_asked_and_new_ones_too() -> None:
    model = Population()
    LivingAdamW(model)
    assert not any(slab.direct_grad for slab in model.layers)
    optimizer = LivingAdamW(model, direct_gradients=True)
    assert all(slab.direct_grad for slab in model.layers)
    model.layers[1].direct_grad = False
    model.population_version += 1
    optimizer.step()
    assert all(slab.direct_grad for slab in model.layers)


def test_accelerate_prepares_it() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Population()
    optimizer = accelerator.prepare(LivingAdamW(model))
    prepared = accelerator.prepare(model)
    before = model.layers[0].key.detach().clone()
    for seed, rows in enumerate(([[1], []], [[3], []])):
        with accelerator.accumulate(prepared):
            accelerator.unwrap_model(prepared).set_gradients(rows, seed)
            optimizer.step()
            optimizer.zero_grad()
        changed = (model.layers[0].key != before).any(dim=1).tolist()
        assert changed == ([False] * 5 if seed == 0 else [False, True, False, True, False])
    assert not accelerator.optimizer_step_was_skipped


def stock_mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=6, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def gradient_norms(
    model: nn.Module, optimizer: torch.optim.Optimizer, events: dict[int, tuple[str, int]]
) -> list[float]:
    """Total norms over 20 steps of two micro-batches each, clipped; every step depends on all updates before it."""
    generator = torch.Generator().manual_seed(1)
    norms = []
    for step in range(20):
        for tokens in torch.randint(64, (2, 2, 16), generator=generator):
            (model(tokens, labels=tokens).loss / 2).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        if step in events:
            kind, uid = events[step]
            getattr(model, f"{kind}_expert")(0, uid, optimizer=optimizer)
        optimizer.zero_grad()
    return norms


def test_a_living_mixtral_trains_as_the_stock_one_with_torchs_adamw() -> None:
    stock = stock_mixtral()
    living = living_moe.convert(stock, preset="grow", verify=False).train()
    plain = [
        {"params": [p for p in stock.parameters() if p.ndim > 1]},
        {"params": [p for p in stock.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    theirs = gradient_norms(stock.train(), torch.optim.AdamW(plain, lr=3e-3, fused=True), {})
    assert gradient_norms(living, LivingAdamW(living, lr=3e-3), {}) == theirs


def test_direct_gradients_change_nothing_through_a_life() -> None:
    stock = stock_mixtral()
    events = {3: ("split", 0), 6: ("split", 1), 9: ("freeze", 2), 12: ("remove", 3), 15: ("thaw", 2)}
    norms = []
    for direct in (False, True):
        living = living_moe.convert(stock, preset="grow", verify=False).train()
        living.set_experts_implementation("active")
        norms.append(gradient_norms(living, LivingAdamW(living, lr=3e-3, direct_gradients=direct), events))
        assert living.expert_counts == [7, 6]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_malloc_is_tuned_on_glibc_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class FakeLibrary:
        def mallopt(self, name: int, value: int) -> int:
            calls.append((name, value))
            return int(name != refused)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary())
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    refused = 0
    assert tune_malloc()
    assert calls == [(malloc.M_MMAP_MAX, 0), (malloc.M_TRIM_THRESHOLD, 2**31 - 1), (malloc.M_TOP_PAD, 2**28)]
    refused = malloc.M_TOP_PAD
    assert not tune_malloc()
    calls.clear()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not tune_malloc() and not calls
