"""What tests of training share: a tokenizer and a tiny source checkpoint on disk, text to learn, a clean accelerate."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from factories import source_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its state in singletons; a test must not inherit the precision or accumulation of another."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def prose(lines: int, seed: int = 0) -> str:
    """Sentences over a small vocabulary: what a source model might know."""
    words = "the cat sat on a mat while dogs bark loudly at night and tall trees sway gently".split()
    rng = random.Random(seed)
    return "".join(" ".join(rng.choices(words, k=10)) + ".\n" for _ in range(lines))


def code(lines: int, seed: int = 0) -> str:
    """Lines of another domain."""
    rng = random.Random(seed)
    return "".join(f"def f{rng.randrange(9)}(x): return x + {rng.randrange(99)} * (x - 1)\n" for _ in range(lines))


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/` (a tiny Mixtral and its tokenizer), `old.txt` and `new.txt`."""
    root = tmp_path_factory.mktemp("source")
    (root / "old.txt").write_text(prose(150), encoding="utf-8")
    (root / "new.txt").write_text(code(150), encoding="utf-8")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([prose(50), code(50)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    model = source_model("mixtral", vocab_size=len(tokenizer))
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root
