"""Optimizer surgery promises that an optimizer follows the experts, or says before anything changes that it cannot.

The oracle knows experts by uid and nothing of slabs, rows or parameters: it holds every expert's moments in a dict and
says what each event makes of them. Hidden size, intermediate size and slots are all 8 here, so a rule that guessed by
shape would mistake one for the other.
"""

import copy
import math

import accelerate
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD, Adafactor, Adam, AdamW, NAdam, RMSprop
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.optimization import Adafactor as FairseqAdafactor

import living_moe
from living_moe.configuration.errors import OptimizerError, PopulationError
from living_moe.modeling_living_moe.lifecycle import surgery
from living_moe.training import optimizer_surgery
from living_moe.training.optimizer_surgery import assert_partition, stage_optimizer_edit
from living_moe.training.optimizers import LivingAdamW

VOCAB = 29
EXPERTS = HIDDEN = 8
ROLES = ("gate_up_proj", "down_proj", "key")


def living_model(preset="grow", **sections):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    source = MixtralForCausalLM(config)
    source.set_experts_implementation("eager")
    for parameter in source.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.4)
    return living_moe.convert(source, preset=preset, verify=False, **sections).train()


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


OPTIMIZERS = {
    "AdamW": lambda model: AdamW(trainable(model), lr=1e-2, foreach=False),
    "AdamW, foreach": lambda model: AdamW(trainable(model), lr=1e-2, foreach=True),
    "AdamW, fused": lambda model: AdamW(trainable(model), lr=1e-2, fused=True),
    "Adam, amsgrad": lambda model: Adam(trainable(model), lr=1e-2, amsgrad=True),
    "SGD": lambda model: SGD(trainable(model), lr=1e-2),
    "SGD, momentum": lambda model: SGD(trainable(model), lr=1e-2, momentum=0.9, nesterov=True),
    "Adafactor": lambda model: Adafactor(trainable(model), lr=1e-2),
    "Adafactor, foreach": lambda model: Adafactor(trainable(model), lr=1e-2, foreach=True),
    "Adafactor of Transformers": lambda model: FairseqAdafactor(trainable(model)),
    "Adafactor of Transformers, momentum": lambda model: FairseqAdafactor(
        trainable(model), lr=1e-2, beta1=0.9, relative_step=False, scale_parameter=False
    ),
    "LivingAdamW": lambda model: LivingAdamW(model, lr=1e-2),
}


@pytest.fixture(params=OPTIMIZERS)
def make_optimizer(request):
    return OPTIMIZERS[request.param]


def train_step(model, optimizer, batch=2):
    ids = torch.randint(VOCAB, (batch, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def slot_parameter(model, layer, slab, role):
    for slot in model.slot_parameters():
        if (slot.layer, slot.slab, slot.role) == (layer, slab, role):
            return slot.parameter
    return None


def member(model, layer, uid):
    return model.living_block(layer).population.find(uid, layer)


def weights_of(model, layer, uid, role):
    found = member(model, layer, uid)
    return slot_parameter(model, layer, found.slab, role).detach()[found.row].clone()


def everything(model, optimizer):
    """All that an event may change, as one comparable structure of plain values."""

    def plain(value):
        if isinstance(value, Tensor):
            return value.tolist()
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    inner = getattr(optimizer, "optimizer", optimizer)
    return plain(
        [
            model.state_dict(),
            [(id(parameter), parameter.grad) for parameter in model.parameters()],
            inner.state_dict(),
            [[id(parameter) for parameter in group["params"]] for group in inner.param_groups],
            [id(parameter) for parameter in inner.state],
            [str(event) for event in model.lineage],
            model.config.to_dict(),
        ]
    )


# -- the oracle --------------------------------------------------------------------------------------------------------

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col")
MOMENTS = ("exp_avg", "momentum_buffer", *SECOND_MOMENTS)


def moments_by_uid(model, optimizer):
    """(layer, role, uid) -> name -> the expert's own part of a moment; empty for an expert that has none."""
    moments = {}
    for slot in model.slot_parameters():
        state = optimizer.state.get(slot.parameter, {})
        per_slot = isinstance(state.get("step"), Tensor) and state["step"].ndim == 1
        # The column factor of a matrix of keys is a mean over all experts: nobody's own.
        names = [n for n in MOMENTS if n in state and (slot.role != "key" or n not in ("col_var", "exp_avg_sq_col"))]
        for expert in model.living_block(slot.layer).population.members:
            if expert.slab == slot.slab:
                own = {name: state[name][expert.row].clone() for name in names}
                if per_slot:
                    own["step"] = state["step"][expert.row].clone()
                moments[slot.layer, slot.role, expert.uid] = {} if per_slot and not own["step"] else own
    return moments


def shared_state(model, optimizer):
    """(layer, slab, role) -> what all slots of a parameter share."""
    shared = {}
    for slot in model.slot_parameters():
        for name, value in optimizer.state.get(slot.parameter, {}).items():
            if not isinstance(value, Tensor) or value.ndim == 0 or name in ("col_var", "exp_avg_sq_col"):
                if slot.role == "key" or name not in ("col_var", "exp_avg_sq_col"):
                    shared[slot.layer, slot.slab, slot.role, name] = copy.deepcopy(value)
    return shared


def reordered(tensor, name, role, order):
    """One expert's moment with its hidden units in another order."""
    if order is None or role == "key":
        return tensor
    row_factor = name in ("row_var", "exp_avg_sq_row")
    column_factor = name in ("col_var", "exp_avg_sq_col")
    if role == "gate_up_proj":
        # Units are the rows of this matrix, twice; the column factor is a mean over them.
        return tensor if column_factor else torch.cat([tensor[: len(order)][order], tensor[len(order) :][order]])
    return tensor if row_factor else tensor[..., order]


class MergeWitness:
    """Notes which experts a merge averages, by uid, for the oracle; the optimizer's part goes on unchanged."""

    def __init__(self, monkeypatch):
        self.sources = {}
        monkeypatch.setattr(surgery, "_surgeon", self)

    def __call__(self, optimizer, model, edits):
        self.sources = {}
        for edit in edits:
            population = model.living_block(edit.layer).population
            uid_at = {(m.slab, m.row): m.uid for m in population.members}
            for sources in edit.edit.rows.values():
                parts = [(uid_at[s.slab, s.row], s.weight, s.neurons_I) for s in sources]
                if len(parts) > 1:
                    self.sources[edit.role] = parts
        return stage_optimizer_edit(optimizer, model, edits)


def merged(before, layer, role, parts):
    """Average of the moments of `parts`: (uid, weight, order of hidden units)."""
    owners = [(before[layer, role, uid], weight, order) for uid, weight, order in parts]
    owners = [(own, weight, order) for own, weight, order in owners if own and weight > 0]
    result = {}
    for name in owners[0][0] if owners else ():
        if name == "step":
            result[name] = max(own[name] for own, _, _ in owners)
            continue
        total = sum(weight for _, weight, _ in owners) if name in SECOND_MOMENTS else 1.0
        result[name] = sum(reordered(own[name], name, role, order) * weight / total for own, weight, order in owners)
    return result


def expected_moments(model, before, event, merge_sources):
    """What every expert alive after `event` should hold, before cold starts are filled in."""
    after = {}
    for layer in range(len(model.living_blocks)):
        for uid in model.expert_uids(layer):
            here = layer == event.layer
            for role in ROLES:
                if here and event.kind == "split" and uid in event.children:
                    own = before[layer, role, event.parents[0]]
                elif here and event.kind == "merge" and uid in event.children and role in merge_sources:
                    own = merged(before, layer, role, merge_sources[role])
                else:
                    own = before[layer, role, uid]
                frozen = slot_parameter(model, layer, member(model, layer, uid).slab, role).requires_grad is False
                after[layer, role, uid] = {} if frozen else own
    return after


def fill_cold_starts(model, optimizer, expected):
    """Experts without moments beside others with some: zeros, and where steps are shared the others' mean square."""
    filled = dict(expected)
    for (layer, role, uid), own in expected.items():
        slab = member(model, layer, uid).slab
        state = optimizer.state.get(slot_parameter(model, layer, slab, role), {})
        per_slot = isinstance(state.get("step"), Tensor) and state["step"].ndim == 1
        neighbours = [
            expected[layer, role, other]
            for other in model.expert_uids(layer)
            if member(model, layer, other).slab == slab and expected[layer, role, other]
        ]
        if own or per_slot or not neighbours:
            continue
        filled[layer, role, uid] = {
            name: sum(n[name] for n in neighbours) / len(neighbours)
            if name in SECOND_MOMENTS
            else torch.zeros_like(neighbours[0][name])
            for name in neighbours[0]
        }
    return filled


def check_event(model, optimizer, before, shared_before, event, merge_sources):
    expected = expected_moments(model, before, event, merge_sources)
    expected = fill_cold_starts(model, optimizer, expected)
    found = moments_by_uid(model, optimizer)
    assert found.keys() == expected.keys()
    for place, own in expected.items():
        assert found[place].keys() == own.keys(), (event, place)
        for name, value in own.items():
            torch.testing.assert_close(found[place][name], value, rtol=1e-5, atol=1e-9, msg=f"{event} {place} {name}")
        # Who did not take part keeps its moments bit for bit, wherever its row went.
        if place in before and place[2] not in (*event.parents, *event.children) and before[place]:
            assert all(torch.equal(found[place][name], before[place][name]) for name in before[place])
    shared = shared_state(model, optimizer)
    for place, value in shared_before.items():
        if place in shared:
            assert torch.equal(torch.as_tensor(shared[place]), torch.as_tensor(value)), place


def apply_event(model, optimizer, kind, layer, first, second):
    """The event on the experts that the two numbers pick; None if the population refuses it."""
    uids = model.expert_uids(layer)
    uid, other = uids[first % len(uids)], uids[second % len(uids)]
    try:
        match kind:
            case "split":
                return model.split_expert(layer, uid, optimizer=optimizer)
            case "merge":
                return model.merge_experts(layer, [uid, other], optimizer=optimizer)
            case "death":
                return model.remove_expert(layer, uid, optimizer=optimizer)
            case "freeze":
                return model.freeze_expert(layer, uid, optimizer=optimizer)
            case "thaw":
                return model.thaw_expert(layer, uid, optimizer=optimizer)
    except PopulationError:
        return None


EVENTS = st.tuples(
    st.sampled_from(["split", "split", "merge", "death", "freeze", "thaw"]),
    st.integers(0, 1),
    st.integers(0, 50),
    st.integers(0, 50),
)
LIVES = st.lists(st.one_of(EVENTS, st.just("train")), min_size=3, max_size=14)
WORLDS = st.sampled_from(
    [
        ("grow", {}),
        ("grow", {"trainable": {"frozen_keys": False}}),
        ("grow", {"experts": {"freeze_pretrained": True}}),
        ("frozen-graft", {"receptive_field": {"attention_rank": 2, "head_rank": 2}}),
    ]
)


#: Cold starts beside experts with moments, in a slab with spare rows and in a full one.
THAWS = [("freeze", 0, 1, 0), "train", ("thaw", 0, 0, 0), ("freeze", 0, 2, 0), ("split", 0, 3, 0), ("thaw", 0, 0, 0)]
#: A frozen expert takes in trained ones, and a trained one takes in a frozen one.
MIXED_MERGES = [("freeze", 1, 2, 0), ("freeze", 1, 5, 0), ("merge", 1, 0, 4), "train", ("merge", 1, 4, 0)]


@pytest.mark.parametrize("family", OPTIMIZERS)
@settings(max_examples=6)
@given(world=WORLDS, trained=st.booleans(), life=LIVES)
@example(world=("grow", {}), trained=True, life=THAWS + MIXED_MERGES)
@example(world=("grow", {"trainable": {"frozen_keys": False}}), trained=True, life=MIXED_MERGES + THAWS)
def test_moments_follow_experts_through_random_lives(family, world, trained, life) -> None:
    preset, sections = world
    model = living_model(preset, **sections)
    optimizer = OPTIMIZERS[family](model)
    groups = [(id(group), group["lr"]) for group in optimizer.param_groups]
    for happening in (["train", "train"] if trained else []) + life + ["train"]:
        if happening == "train":
            train_step(model, optimizer)
            continue
        before, shared = moments_by_uid(model, optimizer), shared_state(model, optimizer)
        with pytest.MonkeyPatch.context() as patch:
            witness = MergeWitness(patch)
            event = apply_event(model, optimizer, *happening)
        if event is not None:
            check_event(model, optimizer, before, shared, event, witness.sources)
            assert_partition(optimizer, model)
            assert [(id(group), group["lr"]) for group in optimizer.param_groups] == groups
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert held == {id(p) for p in trainable(model)}
            assert {id(p) for p in optimizer.state} <= held


class OnePerExpert:
    """AdamW or SGD with momentum, written out, for each expert by itself: its weights, moments and age in dicts."""

    def __init__(self, model, rule, lr):
        self.model, self.rule, self.lr = model, rule, lr
        self.experts = {}
        for layer in range(len(model.living_blocks)):
            for uid in model.expert_uids(layer):
                for role in ROLES:
                    weights = weights_of(model, layer, uid, role)
                    zero = torch.zeros_like(weights)
                    self.experts[layer, role, uid] = {"w": weights, "m": zero, "v": zero, "step": 0}

    def step(self, tokens):
        """One update from the gradients that lie in the model; `tokens`: (layer, uid) of who received any."""
        for (layer, role, uid), expert in self.experts.items():
            found = member(self.model, layer, uid)
            gradient = slot_parameter(self.model, layer, found.slab, role).grad
            if gradient is None or (self.rule == "lazy" and (layer, uid) not in tokens):
                continue
            g, w = gradient[found.row], expert["w"]
            expert["step"] += 1
            if self.rule == "sgd":
                expert["m"] = 0.9 * expert["m"] + g
                expert["w"] = w - self.lr * expert["m"]
                continue
            expert["m"] = 0.9 * expert["m"] + 0.1 * g
            expert["v"] = 0.999 * expert["v"] + 0.001 * g * g
            m_hat, v_hat = expert["m"] / (1 - 0.9 ** expert["step"]), expert["v"] / (1 - 0.999 ** expert["step"])
            expert["w"] = w - self.lr * 0.01 * w - self.lr * m_hat / (v_hat.sqrt() + 1e-8)

    def follow(self, event):
        for role in ROLES:
            if event.kind == "split":
                parent = self.experts[event.layer, role, event.parents[0]]
                self.experts[event.layer, role, event.children[0]] = dict(parent)
            elif event.kind == "death":
                del self.experts[event.layer, role, event.parents[0]]


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        ("adamw", lambda model: AdamW(trainable(model), lr=1e-2, fused=True)),
        ("sgd", lambda model: SGD(trainable(model), lr=1e-2, momentum=0.9)),
        ("lazy", lambda model: LivingAdamW(model, lr=1e-2)),
    ],
)
@settings(max_examples=6)
@given(
    life=st.lists(
        st.tuples(st.sampled_from(["split", "split", "death"]), st.integers(0, 1), st.integers(0, 50), st.just(0)),
        min_size=3,
        max_size=10,
    )
)
def test_a_life_equals_one_optimizer_per_expert(rule, make, life) -> None:
    model = living_model().double()
    optimizer = make(model)
    oracle = OnePerExpert(model, rule, lr=1e-2)
    for happening in life:
        for _ in range(2):
            ids = torch.randint(VOCAB, (1, 4))
            model(input_ids=ids, labels=ids).loss.backward()
            tokens = {
                (layer, uid)
                for layer, block in enumerate(model.living_blocks)
                for uid, count in zip(block.population.uids, block.vitals.since_step.tolist(), strict=True)
                if count
            }
            oracle.step(tokens)
            optimizer.step()
            for block in model.living_blocks:
                block.vitals.since_step = None
            optimizer.zero_grad()
        for (layer, role, uid), expert in oracle.experts.items():
            torch.testing.assert_close(weights_of(model, layer, uid, role), expert["w"], rtol=1e-6, atol=1e-9)
        event = apply_event(model, optimizer, *happening)
        if event is not None:
            oracle.follow(event)


# -- newborns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_before", [True, False])
@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_newborn_trains_from_its_first_step(make_optimizer, preset, train_before) -> None:
    fields = {"receptive_field": {"attention_rank": 2, "head_rank": 2}} if preset == "frozen-graft" else {}
    model = living_model(preset, **fields)
    optimizer = make_optimizer(model)
    if train_before:
        train_step(model, optimizer)
    busiest = int(model.vitals(0)["load"].argmax())
    if preset == "grow":
        event = model.split_expert(0, model.expert_uids(0)[busiest], optimizer=optimizer)
    else:
        event = [model.split_expert(0, uid, optimizer=optimizer) for uid in model.expert_uids(0)][-1]
        # Every token is in the newborn's field.
        model.model.fields.threshold.fill_(-math.inf)
    (newborn,) = event.children
    before = {role: weights_of(model, 0, newborn, role) for role in ROLES}
    train_step(model, optimizer, batch=16)
    assert member(model, 0, newborn).slab == "trainable"
    for role in ("gate_up_proj", "down_proj"):
        assert not torch.equal(weights_of(model, 0, newborn, role), before[role])
        if not isinstance(optimizer, SGD) or optimizer.defaults["momentum"]:
            moments = moments_by_uid(model, optimizer)[0, role, newborn]
            assert moments and all(value.any() for value in moments.values())


def first_update_after_a_late_thaw(make, forget=()):
    """RMS of a thawed expert's first update at optimizer step 5,000, in multiples of the learning rate."""
    model = living_model()
    optimizer = make(model)
    for _ in range(5):
        train_step(model, optimizer, batch=16)
    for state in optimizer.state.values():
        state["step"] = torch.full_like(state["step"], 5000)
        for name in ("exp_avg_sq", "max_exp_avg_sq"):
            if name in state:
                # A mean over 5 steps that began at zero, as it would be after 5,000.
                state[name] /= 1 - 0.999**5
    uid = model.expert_uids(0)[int(model.vitals(0)["load"].argmax())]
    model.freeze_expert(0, uid, optimizer=optimizer)
    model.thaw_expert(0, uid, optimizer=optimizer)
    parameter = slot_parameter(model, 0, "trainable", "gate_up_proj")
    row = member(model, 0, uid).row
    for name in forget:
        optimizer.state[parameter][name][row] = 0
    before = parameter.detach()[row].clone()
    train_step(model, optimizer, batch=16)
    return float((parameter.detach()[row] - before).square().mean().sqrt()) / 1e-2


@pytest.mark.parametrize("family", ["AdamW", "AdamW, foreach", "AdamW, fused", "Adam, amsgrad", "Adafactor"])
def test_expert_without_moments_takes_no_giant_first_step(family) -> None:
    assert 0 < first_update_after_a_late_thaw(OPTIMIZERS[family]) < 1.0


def test_zero_second_moments_would_make_a_giant_first_step() -> None:
    assert first_update_after_a_late_thaw(OPTIMIZERS["AdamW"], forget=["exp_avg_sq"]) > 2.5


def test_lazy_newborn_of_a_frozen_parent_starts_at_step_zero() -> None:
    model = living_model()
    optimizer = LivingAdamW(model)
    for _ in range(3):
        train_step(model, optimizer, batch=16)
    uid = model.expert_uids(0)[0]
    model.freeze_expert(0, uid, optimizer=optimizer)
    model.thaw_expert(0, uid, optimizer=optimizer)
    state = optimizer.state[slot_parameter(model, 0, "trainable", "down_proj")]
    row = member(model, 0, uid).row
    assert state["step"][row] == 0
    assert not state["exp_avg"][row].any()
    assert not state["exp_avg_sq"][row].any()
    assert state["step"].max() == 3


# -- the dead ----------------------------------------------------------------------------------------------------------


def test_nothing_dead_stays_in_the_optimizer(make_optimizer) -> None:
    model = living_model(experts={"shrink_below": 0.0})
    optimizer = make_optimizer(model)
    train_step(model, optimizer, batch=16)
    for _ in range(3):
        model.remove_expert(0, model.expert_uids(0)[1], optimizer=optimizer)
    for role in ROLES:
        parameter = slot_parameter(model, 0, "trainable", role)
        assert parameter.shape[0] == EXPERTS
        for name, value in optimizer.state.get(parameter, {}).items():
            own_rows = isinstance(value, Tensor) and value.ndim and value.shape[0] == EXPERTS
            if own_rows and not (role == "key" and name == "exp_avg_sq_col"):
                assert value[:5].any(), name
                assert not value[5:].any(), name


def test_a_slab_that_goes_leaves_groups_and_state(make_optimizer) -> None:
    model = living_model(trainable={"frozen_keys": False})
    optimizer = make_optimizer(model)
    train_step(model, optimizer)
    gone = [slot.parameter for slot in model.slot_parameters() if slot.layer == 0]
    for uid in model.expert_uids(0):
        model.freeze_expert(0, uid, optimizer=optimizer)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert model.living_block(0).capacities() == {"frozen": EXPERTS}
    assert held.isdisjoint(map(id, gone))
    assert held == {id(parameter) for parameter in trainable(model)}
    assert all(id(parameter) in held for parameter in optimizer.state)
    train_step(model, optimizer)


def test_memory_of_the_state_comes_back_when_a_slab_shrinks() -> None:
    model = living_model()
    optimizer = AdamW(trainable(model))
    train_step(model, optimizer)
    for _ in range(5):
        model.remove_expert(0, model.expert_uids(0)[-1], optimizer=optimizer)
    parameter = slot_parameter(model, 0, "trainable", "down_proj")
    assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    assert parameter.shape[0] == 3


# -- groups, schedulers, clipping --------------------------------------------------------------------------------------


def one_cycle(optimizer):
    has_momentum = "betas" in optimizer.defaults or optimizer.defaults.get("momentum", 0) > 0
    return OneCycleLR(optimizer, max_lr=1e-2, total_steps=20, cycle_momentum=has_momentum)


@pytest.mark.parametrize("family", ["AdamW, fused", "SGD, momentum", "Adafactor, foreach", "LivingAdamW"])
@pytest.mark.parametrize("schedule", [lambda o: LambdaLR(o, lambda step: 1 / (1 + step)), one_cycle])
def test_schedulers_and_clipping_go_on_through_slab_growth(family, schedule) -> None:
    histories = []
    for events in (False, True):
        model = living_model()
        optimizer = OPTIMIZERS[family](model)
        scheduler = schedule(optimizer)
        history = []
        for step in range(6):
            ids = torch.randint(VOCAB, (4, 16))
            model(input_ids=ids, labels=ids).loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            assert norm > 1e-3
            assert torch.cat([gradient.flatten() for gradient in gradients]).norm() <= 1.01e-3
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if events and step in (1, 3):
                model.split_expert(step // 2, model.expert_uids(0)[0], optimizer=optimizer)
            hyperparameters = [{**group, "params": None} for group in optimizer.param_groups]
            history.append(copy.deepcopy(hyperparameters))
        histories.append(history)
    assert histories[0] == histories[1]
    assert histories[1][0] != histories[1][-1]


def frozen_graft():
    return living_model("frozen-graft", receptive_field={"attention_rank": 2, "head_rank": 2})


def group_of(optimizer, parameter):
    numbers = [n for n, group in enumerate(optimizer.param_groups) for p in group["params"] if p is parameter]
    assert len(numbers) == 1
    return numbers[0]


def split_first(model, layer, optimizer):
    return model.split_expert(layer, model.expert_uids(layer)[0], optimizer=optimizer)


def newborn_groups(model, layer, optimizer):
    return [group_of(optimizer, slot_parameter(model, layer, "trainable", role)) for role in ROLES]


def test_a_born_slab_joins_the_group_of_its_role_in_the_nearest_layer() -> None:
    model = frozen_graft()
    deltas = trainable(model)
    split_first(model, 1, None)
    weights = [slot_parameter(model, 1, "trainable", role) for role in ROLES]
    optimizer = AdamW([{"params": deltas}, {"params": weights[:2], "lr": 2e-3}, {"params": weights[2:], "lr": 3e-3}])
    split_first(model, 0, optimizer)
    assert newborn_groups(model, 0, optimizer) == [1, 1, 2]


def test_a_born_slab_joins_the_group_tagged_with_its_role() -> None:
    model = frozen_graft()
    optimizer = LivingAdamW(model)
    split_first(model, 0, optimizer)
    assert [optimizer.param_groups[n]["role"] for n in newborn_groups(model, 0, optimizer)] == [
        "experts",
        "experts",
        "keys",
    ]


def test_a_born_slab_joins_the_group_with_most_slot_parameters() -> None:
    model = living_model(experts={"freeze_pretrained": True})
    keys = [slot.parameter for slot in model.slot_parameters() if slot.role == "key"]
    rest = [parameter for parameter in trainable(model) if all(parameter is not key for key in keys)]
    optimizer = AdamW([{"params": rest}, {"params": keys, "lr": 2e-3}])
    split_first(model, 0, optimizer)
    assert newborn_groups(model, 0, optimizer) == [1, 1, 1]


def test_a_born_slab_joins_the_first_group_without_better_evidence() -> None:
    model = frozen_graft()
    deltas = trainable(model)
    optimizer = AdamW([{"params": deltas[:2]}, {"params": deltas[2:]}])
    split_first(model, 1, optimizer)
    assert newborn_groups(model, 1, optimizer) == [0, 0, 0]


@pytest.mark.parametrize("world", ["grow", "frozen-graft"])
def test_a_saved_state_loads_into_an_optimizer_built_anew(world, tmp_path) -> None:
    model = living_model() if world == "grow" else frozen_graft()
    optimizer = AdamW([(name, p) for name, p in model.named_parameters() if p.requires_grad], lr=1e-2)
    train_step(model, optimizer)
    for layer in (1, 0, 1):
        split_first(model, layer, optimizer)
        train_step(model, optimizer, batch=8)
    model.freeze_expert(0, model.expert_uids(0)[-1], optimizer=optimizer)
    train_step(model, optimizer)
    rebuilt = AdamW([(name, p) for name, p in model.named_parameters() if p.requires_grad], lr=1e-2)
    assert optimizer.param_groups[0]["param_names"] == rebuilt.param_groups[0]["param_names"]
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, rebuilt.param_groups[0]["params"]))
    model.save_pretrained(tmp_path)
    reloaded = living_moe.LivingMoeForCausalLM.from_pretrained(tmp_path)
    assert optimizer.param_groups[0]["param_names"] == [n for n, p in reloaded.named_parameters() if p.requires_grad]
    rebuilt.load_state_dict(optimizer.state_dict())
    before, after = moments_by_uid(model, optimizer), moments_by_uid(model, rebuilt)
    assert all(torch.equal(after[p][name], before[p][name]) for p in before for name in before[p])


def test_accelerates_wrapper_is_seen_through() -> None:
    model = living_model()
    optimizer = accelerate.Accelerator(cpu=True).prepare(AdamW(trainable(model), lr=1e-2))
    assert type(optimizer) is not AdamW
    train_step(model, optimizer)
    (newborn,) = split_first(model, 0, optimizer).children
    before = weights_of(model, 0, newborn, "key")
    train_step(model, optimizer, batch=8)
    assert not torch.equal(weights_of(model, 0, newborn, "key"), before)
    assert_partition(optimizer, model)


def test_a_subclass_with_the_same_state_is_followed() -> None:
    class Mine(AdamW):
        pass

    model = living_model()
    optimizer = Mine(trainable(model))
    train_step(model, optimizer)
    split_first(model, 0, optimizer)
    train_step(model, optimizer)


# -- refusals ----------------------------------------------------------------------------------------------------------


def refuses(model, optimizer, match):
    """A split with this optimizer raises, and nothing at all has changed."""
    before = everything(model, optimizer)
    for layer in (0, 1):
        with pytest.raises(OptimizerError, match=match):
            split_first(model, layer, optimizer)
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("make", [RMSprop, NAdam])
def test_unsupported_optimizer_is_refused_before_anything_changes(make) -> None:
    model = living_model()
    optimizer = make(trainable(model), lr=1e-3)
    train_step(model, optimizer)
    refuses(model, optimizer, f"{make.__name__} is not supported.*AdamW.*build the optimizer anew")


def test_unknown_state_of_a_subclass_is_refused() -> None:
    class Mine(AdamW):
        def step(self, closure=None):
            super().step(closure)
            for parameter in self.state:
                self.state[parameter]["slow_weights"] = parameter.detach().clone()

    model = living_model()
    optimizer = Mine(trainable(model))
    train_step(model, optimizer)
    refuses(model, optimizer, r"layer \d: Mine holds state 'slow_weights'.*unknown.*supported class itself")


def test_state_of_another_population_is_refused() -> None:
    model = living_model()
    optimizer = AdamW(trainable(model))
    train_step(model, optimizer)
    for slot in model.slot_parameters():
        state = optimizer.state[slot.parameter]
        state["exp_avg"] = state["exp_avg"][:-1]
    refuses(model, optimizer, r"holds state 'exp_avg' of shape \(7, .*expected \(8, ")


def test_an_optimizer_that_lacks_a_slab_is_refused() -> None:
    model = living_model()
    missing = slot_parameter(model, 1, "trainable", "down_proj")
    optimizer = AdamW([parameter for parameter in trainable(model) if parameter is not missing])
    refuses(model, optimizer, "layer 1: down_proj of the trainable slab.*none of the AdamW's param groups.*anew")


def test_an_optimizer_may_leave_out_what_is_no_slot_parameter() -> None:
    model = living_model()
    optimizer = AdamW([slot.parameter for slot in model.slot_parameters()])
    train_step(model, optimizer)
    split_first(model, 0, optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 6


def test_a_slab_that_shall_not_train_may_be_left_out() -> None:
    model = living_model()
    for slot in model.slot_parameters():
        slot.parameter.requires_grad_(False)
    optimizer = AdamW(trainable(model))
    split_first(model, 0, optimizer)
    assert not any(slot.parameter.requires_grad for slot in model.slot_parameters())
    train_step(model, optimizer)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_held_twice_is_refused() -> None:
    model = living_model()
    optimizer = AdamW(trainable(model))
    optimizer.param_groups.append(
        {**optimizer.param_groups[0], "params": [slot_parameter(model, 0, "trainable", "key")]}
    )
    refuses(model, optimizer, "layer 0: key of the trainable slab is in the AdamW's param groups 2 times")


def test_optimizer_built_before_a_slab_grew_is_refused_at_its_next_step(make_optimizer) -> None:
    model = living_model()
    optimizer = make_optimizer(model)
    train_step(model, optimizer)
    split_first(model, 0, None)
    before = everything(model, optimizer)
    with pytest.raises(OptimizerError, match=r"built before a slab changed.*Pass optimizer= to the event, or build"):
        optimizer.step()
    assert everything(model, optimizer) == before
    refuses(model, optimizer, "built before a slab changed.*Pass optimizer= to every event, or build")
    train_step(model, make_optimizer(model))


def test_optimizer_built_before_a_slab_was_born_is_refused_at_its_next_step(make_optimizer) -> None:
    model = frozen_graft()
    optimizer = make_optimizer(model)
    train_step(model, optimizer)
    split_first(model, 0, None)
    with pytest.raises(OptimizerError, match=r"Pass optimizer= to the event"):
        optimizer.step()
    refuses(model, optimizer, "layer 0: gate_up_proj of the trainable slab takes gradients but is in none")
    train_step(model, make_optimizer(model))


def test_optimizer_built_before_a_state_dict_brought_a_slab_is_refused() -> None:
    other, model = frozen_graft(), frozen_graft()
    split_first(other, 0, None)
    optimizer = AdamW(trainable(model))
    model.load_state_dict(other.state_dict())
    with pytest.raises(OptimizerError, match="no optimizer holds the new slab"):
        train_step(model, optimizer)
    train_step(model, AdamW(trainable(model)))


def test_two_optimizers_may_share_a_model() -> None:
    model = frozen_graft()
    first = AdamW(trainable(model))
    split_first(model, 0, None)
    second = AdamW([slot_parameter(model, 0, "trainable", role) for role in ROLES])
    train_step(model, first)
    train_step(model, second)


def test_another_models_optimizer_is_left_alone() -> None:
    model, stranger = frozen_graft(), torch.nn.Linear(2, 2)
    split_first(model, 0, None)
    optimizer = SGD(stranger.parameters(), lr=0.1)
    stranger(torch.ones(2)).sum().backward()
    optimizer.step()


def test_event_before_the_first_step_leaves_the_state_to_the_optimizer(make_optimizer) -> None:
    model = living_model()
    optimizer = make_optimizer(model)
    split_first(model, 0, optimizer)
    model.remove_expert(1, model.expert_uids(1)[0], optimizer=optimizer)
    assert not optimizer.state
    train_step(model, optimizer)
    assert_partition(optimizer, model)


@pytest.mark.parametrize("event", ["split_expert", "remove_expert", "freeze_expert"])
def test_a_failure_while_staging_changes_nothing(make_optimizer, event, monkeypatch) -> None:
    model = living_model(experts={"shrink_below": 0.95})
    optimizer = make_optimizer(model)
    train_step(model, optimizer)
    before = everything(model, optimizer)
    calls = []

    def fail_at_last(optimizer, model, edits, joining):
        calls.append("groups")
        raise MemoryError("planted")

    monkeypatch.setattr(optimizer_surgery, "_stage_groups", fail_at_last)
    with pytest.raises(MemoryError, match="planted"):
        getattr(model, event)(0, model.expert_uids(0)[1], optimizer=optimizer)
    assert calls
    assert everything(model, optimizer) == before
    monkeypatch.undo()
    getattr(model, event)(0, model.expert_uids(0)[1], optimizer=optimizer)
    assert everything(model, optimizer) != before
    train_step(model, optimizer)


# -- the assertion itself ----------------------------------------------------------------------------------------------


def test_partition_assertion_finds_a_missing_a_doubled_and_a_dead_parameter() -> None:
    model = living_model()
    optimizer = AdamW(trainable(model))
    parameters = optimizer.param_groups[0]["params"]
    key = slot_parameter(model, 0, "trainable", "key")
    place = next(n for n, parameter in enumerate(parameters) if parameter is key)

    del parameters[place]
    with pytest.raises(AssertionError, match="layer 0: key of the trainable slab is in no param group"):
        assert_partition(optimizer, model)
    parameters += [key, key]
    with pytest.raises(AssertionError, match="in two param groups"):
        assert_partition(optimizer, model)
    del parameters[-1]
    assert_partition(optimizer, model)
    split_first(model, 0, optimizer)
    parameters.append(key)
    with pytest.raises(AssertionError, match="replaced parameter"):
        assert_partition(optimizer, model)
