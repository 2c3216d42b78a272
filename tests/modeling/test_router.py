"""Where tokens go: the choice of clades, who learns from it, and the load-balancing loss."""

import pytest
import torch
from factories import HIDDEN, drift, living_model, mixed_text, source_model
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from living_moe import LivingMoeForCausalLM
from living_moe.modeling_living_moe.families import Scoring
from living_moe.modeling_living_moe.population import Population
from living_moe.modeling_living_moe.router import LivingRouter, load_balancing_loss

# -- choice ------------------------------------------------------------------------------------------------------------


def new_router(rule: Scoring, experts: int) -> tuple[LivingRouter, Population]:
    router = LivingRouter(rule, {"trainable": experts}, HIDDEN)
    torch.nn.init.normal_(router.keys["trainable"])
    return router, Population({"trainable": experts}, HIDDEN, num_groups=rule.num_groups)


@pytest.mark.parametrize(("groups", "top_groups", "top_k"), [(2, 1, 2), (4, 2, 3), (4, 4, 2), (3, 2, 1)])
def test_tokens_stay_within_their_best_groups(groups: int, top_groups: int, top_k: int) -> None:
    rule = Scoring(top_k, function="sigmoid", num_groups=groups, top_groups=top_groups)
    router, population = new_router(rule, 12)
    population.table("trainable").bias.normal_()
    logits_TE, weights_TK, index_TK = router(torch.randn(50, HIDDEN), population)
    choice_TGM = (logits_TE.sigmoid() + population.table("trainable").bias).view(50, groups, -1)
    best_TG = choice_TGM.topk(2).values.sum(-1).topk(top_groups).indices
    used_TK = index_TK // (12 // groups)
    assert all(set(used.tolist()) <= set(best.tolist()) for used, best in zip(used_TK, best_TG, strict=True))
    torch.testing.assert_close(weights_TK.sum(-1), torch.ones(50))


def test_groups_of_unequal_size_compete_by_their_two_best() -> None:
    rule = Scoring(1, function="sigmoid", num_groups=2, top_groups=1)
    router, population = new_router(rule, 4)
    population.table("trainable").group.copy_(torch.tensor([0, 1, 1, 1]))
    population.stale()
    router.keys["trainable"].data = torch.eye(4, HIDDEN)
    scores = torch.tensor([[0.9, 0.4, 0.3, 0.1], [0.6, 0.5, 0.2, 0.1]])
    hidden_TH = torch.nn.functional.pad(scores.logit(), (0, HIDDEN - 4))
    # One clade alone counts once: .9 beats .4 + .3, and .6 loses to .5 + .2.
    assert router(hidden_TH, population)[2].tolist() == [[0], [1]]


def test_the_selection_bias_chooses_but_does_not_weigh() -> None:
    rule = Scoring(2, function="sigmoid", normalise=False, scaling=2.5)
    router, population = new_router(rule, 6)
    hidden_TH = torch.randn(20, HIDDEN)
    logits_TE = router(hidden_TH, population)[0]
    population.table("trainable").bias[4] = 10.0
    _, weights_TK, index_TK = router(hidden_TH, population)
    assert (index_TK == 4).any(dim=1).all()
    torch.testing.assert_close(weights_TK, 2.5 * logits_TE.sigmoid().gather(1, index_TK))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_weights_come_in_the_dtype_of_the_source(family: str) -> None:
    source, model = source_model(family).bfloat16(), living_model(family).bfloat16()
    seen: dict[str, Tensor] = {}
    source.model.layers[-1].mlp.gate.register_forward_hook(lambda m, a, output: seen.update(source=output[1]))
    model.living_blocks[-1].router.register_forward_hook(lambda m, a, output: seen.update(living=output[1]))
    for each in (source, model):
        each(mixed_text(2, 6))
    assert seen["living"].dtype == seen["source"].dtype
    assert torch.equal(seen["living"], seen["source"])


def test_a_split_at_a_facet_of_the_queries_divides_them_in_two() -> None:
    model = living_model("mixtral").train()
    ids = mixed_text(8, 16)
    model(ids)
    uid = max(range(8), key=lambda uid: int((model.living_blocks[0].vitals.sample[1] == uid).sum()))
    hidden_SH, index_SK, *_ = model.living_blocks[0].vitals.sample
    queries = hidden_SH[(index_SK == uid).any(dim=1)]
    model.split_expert(0, uid)
    population = model.living_blocks[0].population
    side = queries @ population.facet_normal[0] + population.facet_offset[0] >= 0
    assert 0.1 < float(side.float().mean()) < 0.9
    # Each query is on the side whose mean is nearer: the facet is the bisector of 2-means.
    means = torch.stack([queries[~side].mean(0), queries[side].mean(0)])
    assert torch.equal(torch.cdist(queries, means).argmin(1).bool(), side)


def test_twins_part_at_their_first_gradient_and_only_servers_learn() -> None:
    model = living_model("mixtral").train()
    ids = mixed_text(8, 16)
    newborn = model.split_expert(0, 3).children[0]
    model(ids, labels=ids).loss.backward()
    keys = model.living_blocks[0].router.keys["trainable"]
    row = model.expert_uids(0).index(newborn)
    assert torch.equal(keys[3], keys[row])
    assert keys.grad[3].any() and keys.grad[row].any() and not torch.equal(keys.grad[3], keys.grad[row])
    assert not keys.grad[len(model.expert_uids(0)) :].any(), "spare rows learn nothing"


def test_router_logits_are_those_of_every_alive_expert() -> None:
    model = living_model("mixtral")
    model.split_expert(0, 3)
    model.remove_expert(1, 2)
    with torch.no_grad():
        output = model(mixed_text(2, 6), output_router_logits=True)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(12, 9), (12, 7)]
    torch.testing.assert_close(output.router_logits[0][:, 3], output.router_logits[0][:, 8], rtol=1e-6, atol=1e-6)


def test_closed_newborns_are_in_no_product_with_the_sources_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = source_model("mixtral"), living_model("mixtral", "frozen-graft")
    for uid in range(3):
        model.split_expert(0, uid)
    hidden_TH = torch.randn(20, HIDDEN)
    block = model.living_blocks[0]

    def rounding(self: LivingRouter, query_TD: Tensor, keys_ED: Tensor) -> Tensor:
        """As a kernel may: by how many keys there are."""
        return (query_TD @ keys_ED.T) * (1.0 + 1e-6 * len(keys_ED))

    monkeypatch.setattr(LivingRouter, "logits", rounding)
    roots_E = torch.tensor([member.field == 0 for member in block.population.members])
    assert 0 < int(roots_E.sum()) < len(roots_E)
    logits_TE = block.router(hidden_TH, block.population)[0]
    keys_ED = source.model.layers[0].mlp.gate.weight
    assert torch.equal(logits_TE[:, roots_E], rounding(block.router, hidden_TH, keys_ED))


# -- load-balancing loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("clades", [3, 8, 50])
def test_a_balanced_layer_gives_top_k_whatever_its_count(clades: int, top_k: int) -> None:
    clades_TK = torch.stack([(torch.arange(clades * 4) + k) % clades for k in range(top_k)], dim=1)
    loss = load_balancing_loss(torch.zeros(clades * 4, clades), clades_TK)
    assert float(loss) == pytest.approx(top_k, rel=1e-5)


def test_an_unbalanced_layer_gives_more() -> None:
    logits_TN = torch.zeros(40, 8)
    logits_TN[:, 0] = 3.0
    assert float(load_balancing_loss(logits_TN, torch.zeros(40, 1, dtype=torch.int64))) > 3.0


@pytest.mark.parametrize("masked", [False, True])
def test_one_layer_equals_transformers_forward_and_backward(masked: bool) -> None:
    logits_TN = torch.randn(30, 7, requires_grad=True)
    clades_TK = logits_TN.topk(2).indices
    mask = (torch.rand(3, 10) < 0.6).long() if masked else None
    ours = load_balancing_loss(logits_TN, clades_TK, None if mask is None else mask.flatten())
    theirs = load_balancing_loss_func((logits_TN,), 7, 2, mask)
    torch.testing.assert_close(ours, theirs)
    for mine, his in zip(torch.autograd.grad(ours, logits_TN), torch.autograd.grad(theirs, logits_TN), strict=True):
        assert his.any()
        torch.testing.assert_close(mine, his)


def test_masked_tokens_weigh_nothing() -> None:
    logits_TN = torch.randn(30, 7)
    mask_T = torch.rand(30) < 0.5
    kept = load_balancing_loss(logits_TN[mask_T], logits_TN[mask_T].topk(2).indices)
    torch.testing.assert_close(load_balancing_loss(logits_TN, logits_TN.topk(2).indices, mask_T), kept)
    assert float(load_balancing_loss(logits_TN, logits_TN.topk(2).indices, torch.zeros(30))) == 0.0


def auxiliary(model: LivingMoeForCausalLM, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    loss: Tensor = model(ids, attention_mask=mask, output_router_logits=True).aux_loss
    return loss


def test_a_split_leaves_the_loss_where_it_was_since_clades_are_balanced_not_experts() -> None:
    model, source = living_model("mixtral"), source_model("mixtral")
    ids = mixed_text(4, 12)
    with torch.no_grad():
        per_layer = [
            load_balancing_loss_func((logits,), 8, 2) for logits in source(ids, output_router_logits=True).router_logits
        ]
        for uid in range(8):
            model.split_expert(0, uid)
        torch.testing.assert_close(auxiliary(model, ids), torch.stack(per_layer).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", ["grow", "frozen-graft"])
def test_unequal_layers_have_a_loss_whose_gradient_reaches_their_keys(preset: str) -> None:
    model = living_model("qwen3_moe", preset, sections={"trainable": {"frozen_keys": True}}).train()
    for uid in (0, 1, 2):
        model.split_expert(0, uid)
    model.remove_expert(1, 4)
    drift(model, 0)
    ids = mixed_text(4, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    assert len(set(model.expert_counts)) == 2
    loss = auxiliary(model, ids, mask)
    assert 1.0 < float(loss.detach()) < 8.0
    loss.backward()
    for block in model.living_blocks:
        for slab, keys in block.router.keys.items():
            assert keys.grad is not None and keys.grad[: block.population.alive[slab]].any()


def test_the_loss_of_fields_weighs_each_by_its_tokens() -> None:
    model = living_model("mixtral", "frozen-graft")
    for uid in range(8):
        model.split_expert(0, uid)
    drift(model, 0)
    ids = mixed_text(4, 12)
    caught: list[tuple[Tensor, Tensor]] = []
    model.living_blocks[0].router.register_forward_hook(
        lambda module, args, output: caught.append((args[2], output[0]))
    )
    with torch.no_grad():
        both = auxiliary(model, ids)
        field_T = caught[0][0]
        shares = [float((field_T == field).float().mean()) for field in (0, 1)]
        assert min(shares) > 0.2
        expected = []
        for block in model.living_blocks:
            choices: dict[int, tuple[Tensor, Tensor]] = {}
            hidden = []
            hook = block.register_forward_pre_hook(lambda module, args, hidden=hidden: hidden.append(args[0]))
            model(ids)
            hook.remove()
            block.router(hidden[0].reshape(-1, HIDDEN), block.population, field_T, (1,), choices)
            terms = [load_balancing_loss(*choices[field], field_T == field) * shares[field] for field in (0, 1)]
            expected.append(sum(terms))
    torch.testing.assert_close(both, torch.stack(expected).mean(), rtol=1e-5, atol=1e-6)


def test_the_weight_of_the_loss_is_the_configs_own_else_the_sources() -> None:
    ids = mixed_text(4, 12)
    for sections, weight in (
        ({}, 0.25),
        ({"router": {"aux_loss_coef": 0.5}}, 0.5),
        ({"router": {"aux_loss_coef": 0.0}}, 0.0),
    ):
        model = living_model("mixtral", sections=sections, router_aux_loss_coef=0.25)
        with torch.no_grad():
            plain = model(ids, labels=ids)
            with_loss = model(ids, labels=ids, output_router_logits=True)
        assert plain.aux_loss is None and plain.router_logits is None
        torch.testing.assert_close(with_loss.loss, plain.loss + weight * with_loss.aux_loss)


def test_the_z_loss_is_the_mean_square_of_the_log_sum() -> None:
    ids = mixed_text(4, 12)
    model = living_model("mixtral", sections={"router": {"z_loss_coef": 0.1}})
    model.split_expert(0, 3)
    with torch.no_grad():
        output = model(ids, labels=ids, output_router_logits=True)
        squares = [logits.logsumexp(-1).square().mean() for logits in output.router_logits]
        model.config.router.z_loss_coef = 0.0
        without = model(ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(output.loss, without.loss + 0.1 * torch.stack(squares).mean())
