"""What keeps a step's cost with the experts that receive tokens: each way around work equals the work itself."""

import pytest
import torch
from factories import FAMILIES, HIDDEN, live, living_model, token_ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import assert_equals_oracle
from torch import Tensor

from living_moe import LivingMoeForCausalLM
from living_moe.modeling_living_moe import active_experts, router
from living_moe.modeling_living_moe.block import ForwardContext, LivingMoeBlock
from living_moe.modeling_living_moe.gradient_sketch import sketch_rows
from living_moe.modeling_living_moe.population import Population
from living_moe.modeling_living_moe.receptive_field import FieldGate
from living_moe.training.optimizers import LivingAdamW

PRESETS = ("grow", "frozen-graft")
SECTIONS = {
    "family": {},
    "top_any": {"router": {"selection": "top_any", "threshold": -0.5}},
    "rectified": {"router": {"selection": "top_any", "gate": "relu"}},
    "cosine": {"router": {"similarity": "cosine", "temperature": 0.2}},
    "learned": {"router": {"similarity": "cosine", "temperature": 0.2, "learn_temperature": True}},
}


def lived(family: str, preset: str, kind: str, seed: int, events: int = 12) -> LivingMoeForCausalLM:
    model = living_model(family, preset, sections={name: dict(s) for name, s in SECTIONS[kind].items()})
    live(model, events, seed)
    return model


def cells_by_products(hidden_TH: Tensor, population: Population, field: int) -> tuple[Tensor, Tensor]:
    """Address and server of each token in each cell, every leaf of every cell tried: the oracle of the walk."""
    cells = population.visible_cells(field)
    address_TN = torch.tensor([[cell[0].index for cell in cells]]).repeat(len(hidden_TH), 1)
    server_TN = torch.tensor([[max(cell[0].server, 0) for cell in cells]]).repeat(len(hidden_TH), 1)
    side_TP = torch.where(hidden_TH @ population.facet_normal.T + population.facet_offset >= 0, 1, -1)
    for column, cell in enumerate(cells):
        for address in cell:
            for leaf in population.leaves:
                if leaf.uid == address.uid:
                    signs_P = torch.zeros(side_TP.shape[1], dtype=torch.int64)
                    for facet, side in leaf.path:
                        signs_P[facet] = side
                    satisfied_T = side_TP @ signs_P == len(leaf.path)
                    address_TN[satisfied_T, column] = address.index
                    server_TN[satisfied_T, column] = max(address.server, 0)
    return address_TN, server_TN


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    family=st.sampled_from(FAMILIES),
    preset=st.sampled_from(PRESETS),
    seed=st.integers(0, 999),
    tokens=st.sampled_from([0, 1, 40]),
)
def test_the_walk_through_the_facets_finds_who_all_products_find(
    family: str, preset: str, seed: int, tokens: int
) -> None:
    model = lived(family, preset, "family", seed, events=20)
    for block in model.living_blocks:
        population = block.population
        hidden_TH = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)) * 2
        for field in {member.field for member in population.members} | {0}:
            view = population.view(field, hidden_TH.device)
            found = router.served_cells(hidden_TH, population, view)
            for ours, theirs in zip(found, cells_by_products(hidden_TH, population, field), strict=True):
                assert torch.equal(ours, theirs.reshape(ours.shape))


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(preset=st.sampled_from(PRESETS), seed=st.integers(0, 999))
def test_an_address_serves_exactly_where_its_clade_sends_the_token(preset: str, seed: int) -> None:
    """What a search asks of its candidates, against the view that knows all cells."""
    for block in lived("mixtral", preset, "family", seed, events=20).living_blocks:
        population = block.population
        hidden_TH = torch.randn(30, HIDDEN, generator=torch.Generator().manual_seed(seed)) * 2
        address_TN, _ = cells_by_products(hidden_TH, population, 0)
        every_TC = torch.arange(-1, len(population.addresses)).repeat(30, 1)
        serves_TC = population.address_book(hidden_TH.device).serves(hidden_TH, every_TC)
        assert not serves_TC[:, 0].any(), "no address serves nobody"
        for address in population.addresses:
            expected_T = (address_TN == address.index).any(dim=1) & (address.server >= 0)
            assert torch.equal(serves_TC[:, address.index + 1], expected_T), address


def test_leaves_are_remembered_as_they_would_be_read() -> None:
    for seed in range(3):
        for block in lived("mixtral", "grow", "family", seed, events=25).living_blocks:
            remembered = list(block.population.leaves)
            block.population.stale()
            assert block.population.leaves == remembered


# -- gradients of the scores of the chosen -----------------------------------------------------------------------------


def routed(
    block: LivingMoeBlock, hidden_TH: Tensor, field_T: Tensor | None, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, ...]:
    """Weights, choice, and gradients of the input and of every parameter of the router."""
    monkeypatch.setattr(router, "SPARSE_FROM", 0 if sparse else 10**9)
    hidden_TH = hidden_TH.clone().requires_grad_()
    block.router.zero_grad()
    _, weights_TK, index_TK = block.router(
        hidden_TH, block.population, field_T, (1,), all_logits=False, may_search=False
    )
    factor_TK = torch.randn(weights_TK.shape, generator=torch.Generator().manual_seed(3))
    (weights_TK * factor_TK).sum().backward()
    grads = [p.grad for p in block.router.parameters() if p.requires_grad]
    assert hidden_TH.grad is not None
    return weights_TK.detach(), index_TK, hidden_TH.grad, *(torch.zeros(()) if g is None else g for g in grads)


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_taking_gradients_at_the_chosen_only_changes_no_weight_and_no_gradient(
    family: str, preset: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lived(family, preset, kind, seed=5)
    for block in model.living_blocks:
        hidden_TH = torch.randn(30, HIDDEN, generator=torch.Generator().manual_seed(1))
        field_T = torch.arange(30) % 2 if block.has_fields else None
        ours = routed(block, hidden_TH, field_T, True, monkeypatch)
        theirs = routed(block, hidden_TH, field_T, False, monkeypatch)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert ours[2].abs().sum() > 0
        for mine, his in zip(ours[2:], theirs[2:], strict=True):
            torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_takes_gradients_at_the_chosen_only_equals_the_oracle(
    family: str, preset: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "SPARSE_FROM", 0)
    model = lived(family, preset, kind, seed=8)
    assert_equals_oracle(model, "active", "grouped_mm", scale=0.5)


def test_a_softmax_over_all_clades_keeps_the_gradient_of_every_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "SPARSE_FROM", 0)
    model = living_model("qwen3_moe", norm_topk_prob=False)
    block = model.living_blocks[0]
    logits_TE, weights_TK, _ = block.router(torch.randn(6, HIDDEN), block.population, all_logits=False)
    weights_TK[:, 0].sum().backward()
    assert logits_TE.requires_grad
    grad = block.router.keys["trainable"].grad
    assert grad is not None and (grad.abs().sum(dim=1) > 0).all(), "the keys of those not chosen lost their gradient"


@pytest.mark.parametrize("loss", ["balance", "z"])
def test_logits_that_somebody_reads_keep_their_gradient(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = living_model("mixtral").train()
    model.config.router.z_loss_coef = 0.1 if loss == "z" else 0.0
    ids = token_ids(2, 12)
    grads = []
    for bound in (0, 10**9):
        monkeypatch.setattr(router, "SPARSE_FROM", bound)
        model.zero_grad()
        model(ids, labels=ids, output_router_logits=loss == "balance").loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for mine, his in zip(*grads, strict=True):
        assert torch.equal(mine, his)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_models_learn_alike_with_gradients_at_the_chosen_only(
    checkpointing: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = token_ids(2, 16)
    grads = []
    for bound in (0, 10**9):
        monkeypatch.setattr(router, "SPARSE_FROM", bound)
        model = lived("mixtral", "grow", "family", seed=2).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in range(2):
                loss = model(ids, labels=ids, use_cache=False).loss
                loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, mine in grads[0].items():
        scale = float(grads[1][name].abs().max())
        torch.testing.assert_close(mine, grads[1][name], rtol=0, atol=(2e-2 if autocast else 1e-5) * scale + 1e-9)


# -- gradients of experts that received no token -----------------------------------------------------------------------


def half_filled(rows: int = 12) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """A parameter whose direct gradient is filled in rows 2 and 7, and another with a plain one."""
    direct, plain = (torch.nn.Parameter(torch.randn(rows, 5, 3)) for _ in range(2))
    buffer = active_experts.GradientRows.take_up(direct, [2, 7])
    assert buffer is not None
    for row in (2, 7):
        buffer.rows[row].normal_()
    buffer.note_written([2, 7])
    plain.grad = torch.randn_like(plain)
    return direct, plain


def test_norm_and_scaling_of_the_filled_rows_are_those_of_the_gradients() -> None:
    torch.manual_seed(0)
    parameters = [*half_filled(), torch.nn.Parameter(torch.zeros(2))]
    expected = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    torch.testing.assert_close(active_experts.gradient_norm(parameters), expected)
    before = [p.grad.clone() for p in parameters if p.grad is not None]
    active_experts.scale_gradients(parameters, 0.25)
    for parameter, grad in zip(parameters, before, strict=False):
        assert parameter.grad is not None and torch.equal(parameter.grad, grad * 0.25)
    assert active_experts.filled_rows(parameters[:1]) == [2, 7], "after scaling every row counted as filled"
    assert active_experts.filled_rows(parameters[:2]) is None


def test_rows_that_somebody_else_wrote_count_in_the_norm() -> None:
    direct, _ = half_filled()
    assert direct.grad is not None
    direct.grad[4] = 100.0
    torch.testing.assert_close(active_experts.gradient_norm([direct]), direct.grad.norm())
    assert active_experts.filled_rows([direct]) == list(range(12))


@pytest.mark.parametrize("filled", [[], [3], [0, 7, 31]])
def test_sketches_of_the_filled_rows_are_those_of_all(filled: list[int]) -> None:
    torch.manual_seed(0)
    gradients = [torch.zeros(32, 40, 500), torch.zeros(32, 500, 20)]
    for gradient in gradients:
        gradient[filled] = torch.randn(len(filled), *gradient.shape[1:])
    for ours, theirs in zip(sketch_rows(gradients, 30, filled), sketch_rows(gradients, 30), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("direct", [False, True])
def test_a_run_that_grows_trains_every_newborn_that_gets_tokens_and_no_other(direct: bool) -> None:
    torch.manual_seed(0)
    model = living_model("mixtral").train()
    model.set_experts_implementation("active")
    optimizer = LivingAdamW(model, lr=1e-2, direct_gradients=direct)
    born: dict[int, Tensor] = {}
    for step in range(12):
        ids = token_ids(2, 16, seed=step)
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        model.lifecycle_step(optimizer)
        optimizer.zero_grad()
        for uid in model.expert_uids(0)[: 8 if step < 6 else 0]:
            newborn = model.split_expert(0, uid, optimizer=optimizer).children[0]
            born[newborn] = expert(model, newborn)
    assert model.expert_counts[0] == 8 + len(born) == 56
    received = dict(zip(model.expert_uids(0), model.vitals(0)["tokens"].tolist(), strict=True))
    for uid, weights in born.items():
        assert torch.equal(expert(model, uid), weights) == (received[uid] == 0), f"{uid}: {received[uid]} tokens"
    assert any(received[uid] for uid in born) and not all(received[uid] for uid in born)


def expert(model: LivingMoeForCausalLM, uid: int) -> Tensor:
    block = model.living_blocks[0]
    member = block.population.find(uid, 0)
    slab = block.experts.weights(member.slab)
    return torch.cat([slab.gate_up_proj[member.row].flatten(), slab.down_proj[member.row].flatten()]).detach().clone()


def test_fields_are_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer with fields may not search, but spares gradients like any other."""
    monkeypatch.setattr(router, "SPARSE_FROM", 0)
    model = lived("mixtral", "frozen-graft", "family", seed=3)
    block = model.living_blocks[0]
    block.context = ForwardContext(FieldGate(torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 6, 1)))
    calls: list[bool] = []
    original = block.router._with_gradient
    monkeypatch.setattr(block.router, "_with_gradient", lambda *args: calls.append(True) or original(*args))
    for read in (True, False):
        block.context.all_logits = read
        block(torch.randn(1, 6, HIDDEN, requires_grad=True))
    assert calls == [True]
