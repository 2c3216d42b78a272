"""A grown living model does what users of Transformers do with any causal LM."""

from pathlib import Path

import factories
import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from living_moe import LivingMoeForCausalLM


@pytest.fixture(params=["grow", "frozen-graft"])
def grown(request: pytest.FixtureRequest) -> LivingMoeForCausalLM:
    """Unequal counts, mixed slabs, and (frozen-graft) a calibrated gate."""
    model = factories.living_model("mixtral", request.param)
    for layer, uid in ((0, 1), (0, 2), (1, 3)):
        model.split_expert(layer, uid)
    factories.drift(model, seed=3)
    assert len(set(model.expert_counts)) == 2
    return model.eval()


def test_the_text_generation_pipeline_writes(grown: LivingMoeForCausalLM):
    words = {f"w{number}": number for number in range(factories.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2")
    write = pipeline("text-generation", model=grown, tokenizer=fast)
    written = write("w5 w6 w7", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert written.startswith("w5 w6 w7")
    assert len(written.removeprefix("w5 w6 w7").split()) >= 1


def test_a_left_padded_batch_writes_what_each_prompt_writes_alone(grown: LivingMoeForCausalLM):
    short, long = factories.token_ids(1, 5, seed=1), factories.token_ids(1, 9, seed=2)
    batch = torch.cat([torch.nn.functional.pad(short, (4, 0)), long])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    together = grown.generate(batch, attention_mask=mask, **options)[:, 9:]
    for row, prompt in zip(together, (short, long), strict=True):
        alone = grown.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, prompt.shape[1] :]
        assert torch.equal(row, alone)


def test_beams_with_and_without_a_cache_agree(grown: LivingMoeForCausalLM):
    prompt = factories.token_ids(2, 6)
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=6, num_beams=3, pad_token_id=0)
    assert torch.equal(grown.generate(prompt, **options), grown.generate(prompt, use_cache=False, **options))


def test_lora_on_attention_trains_and_merges(grown: LivingMoeForCausalLM):
    ids = factories.token_ids(2, 12)
    adapted = peft.get_peft_model(grown, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapted.eval()
    before = factories.logits(adapted, ids)
    torch.testing.assert_close(factories.logits(adapted.merge_and_unload(), ids), before, rtol=1e-4, atol=1e-5)


def test_a_resized_vocabulary_is_saved_and_loaded(grown: LivingMoeForCausalLM, tmp_path: Path):
    grown.resize_token_embeddings(factories.VOCAB + 5)
    ids = torch.full((1, 4), factories.VOCAB + 2)
    before = factories.logits(grown, ids)
    grown.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
    assert before.shape[-1] == factories.VOCAB + 5
    assert torch.equal(factories.logits(loaded, ids), before)


def test_bf16_loads_trains_and_keeps_its_tables(grown: LivingMoeForCausalLM, tmp_path: Path):
    grown.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded.vitals(0)["load"].dtype == torch.float32
    assert loaded.expert_uids(0) == grown.expert_uids(0)
    ids = factories.token_ids(2, 8)
    loss = loaded.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)


def test_a_compiled_model_computes_the_same(grown: LivingMoeForCausalLM):
    ids = factories.token_ids(2, 8)
    expected = factories.logits(grown, ids)
    compiled = torch.compile(grown, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)
