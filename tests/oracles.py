"""Comparison of a living layer with the oracle, forward and backward, for tests of routers of every kind."""

import torch
from torch import Tensor

from living_moe import LivingMoeForCausalLM
from living_moe.modeling_living_moe.block import ForwardContext, LivingMoeBlock
from living_moe.modeling_living_moe.receptive_field import FieldGate
from living_moe.modeling_living_moe.reference import reference_forward


def gradients(block: LivingMoeBlock, output_TH: Tensor, hidden_TH: Tensor) -> dict[str, Tensor]:
    """Of a loss that weighs every output: of the input, and of all parameters of the block that take gradients."""
    block.zero_grad()
    hidden_TH.grad = None
    weights = torch.randn(output_TH.shape, generator=torch.Generator().manual_seed(7))
    (output_TH * weights).sum().backward()
    found = {"hidden": hidden_TH.grad.clone()}
    for name, parameter in block.named_parameters():
        if parameter.requires_grad:
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    return found


def assert_equals_oracle(
    model: LivingMoeForCausalLM,
    *implementations: str,
    tokens: int = 12,
    seed: int = 0,
    layer: int = 0,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Compare one layer on random tokens, of random fields where the model has fields; returns the gradients."""
    block = model.living_blocks[layer]
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(tokens, block.router.hidden_size, generator=generator) * scale
    hidden_TH = hidden_TH.to(model.dtype).requires_grad_()
    field_T, context = None, ForwardContext(all_logits=False)
    if block.has_fields:
        field_T = torch.randint(2, (tokens,), generator=generator)
        context.gate = FieldGate(field_T[None], torch.zeros(1, tokens, 1))
    shared, block.shared_experts = block.shared_experts, None
    block.train()
    try:
        expected_TH = reference_forward(block, hidden_TH, field_T)
        slow = gradients(block, expected_TH, hidden_TH)
        for implementation in implementations or ("grouped_mm",):
            model.set_experts_implementation(implementation)
            block.context = context
            output_TH = block(hidden_TH[None])[0]
            torch.testing.assert_close(output_TH, expected_TH, rtol=1e-4, atol=1e-5)
            fast = gradients(block, output_TH, hidden_TH)
            for name in slow:
                torch.testing.assert_close(
                    fast[name], slow[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
    finally:
        block.shared_experts, block.context = shared, None
    return slow
