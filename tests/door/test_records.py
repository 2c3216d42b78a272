"""What a model says of itself: experts by kind, parameters, events."""

from factories import living_model

from living_moe.records import population


def test_experts_are_told_apart_by_what_differs_from_the_backbones_own() -> None:
    model = living_model("mixtral", sections={"experts": {"ternary_tiers": [1], "tier_factor": 2}})
    before = sum(model.expert_counts)
    width = model.living_block(0).experts.intermediate_size
    model.freeze_expert(0, model.expert_uids(0)[0])
    one, other = model.expert_uids(0)[-2:]
    model.merge_experts(0, [one, other], tier_up=True)
    layers = [population(block) for block in model.living_blocks]
    assert layers[0]["frozen"] == 1 and layers[0][f"trainable, {2 * width} hidden units, 1.58 bits"] == 1
    assert list(layers[1]) == ["trainable"]
    assert sum(sum(layer.values()) for layer in layers) == sum(model.expert_counts) == before - 1
