"""Text to blocks, blocks to batches: nothing lost, nothing padded, an order that is a pure function of the seed."""

import itertools
import json
from pathlib import Path

import datasets
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from living_moe.configuration.errors import TrainingError
from living_moe.training.data import BlockLoader, TokenBlocks, load_text, read_blocks, tokenize


@pytest.fixture(scope="module")
def tokenizer(source: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(source / "model")


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(1, 5))
def test_blocks_are_the_stream_cut_in_order(lengths: list[int], block_size: int) -> None:
    numbers = iter(range(1000))
    parts = [torch.tensor([next(numbers) for _ in range(length)], dtype=torch.int32) for length in lengths]
    if sum(lengths) < block_size:
        with pytest.raises(TrainingError, match="less than one block"):
            TokenBlocks(parts, block_size)
        return
    cut = TokenBlocks(parts, block_size)
    whole = torch.arange(sum(lengths))
    assert len(cut) == len(whole) // block_size
    for number in range(len(cut)):
        assert cut[number].dtype == torch.int64
        assert cut[number].tolist() == whole[number * block_size : (number + 1) * block_size].tolist()
    assert cut.tokens(0, 10_000).tolist() == whole.tolist()
    with pytest.raises(IndexError):
        cut[len(cut)]


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 20))
def test_processes_share_out_what_one_process_sees(
    number: int, batch: int, processes: int, seed: int, start: int
) -> None:
    rows = torch.arange(number * 2).view(number, 2)
    alone = BlockLoader(rows, batch * processes, seed=seed)
    ranks = [BlockLoader(rows, batch, seed=seed, rank=rank, world_size=processes) for rank in range(processes)]
    expected = [b["input_ids"] for b in itertools.islice(alone.batches(start), 4)]
    shares = [[b["input_ids"] for b in itertools.islice(rank.batches(start), 4)] for rank in ranks]
    for step in range(4):
        assert torch.equal(torch.cat([share[step] for share in shares]), expected[step])


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 30), st.none() | st.integers(0, 3))
def test_a_loader_starts_anywhere_as_if_it_had_come_there(
    number: int, batch: int, start: int, seed: int | None
) -> None:
    rows = torch.arange(number * 2).view(number, 2)
    loader = BlockLoader(rows, batch, seed=seed)
    from_the_start = [b["labels"].tolist() for b in itertools.islice(loader.batches(0), start + 3)]
    again = BlockLoader(rows, batch, seed=seed)
    assert [b["labels"].tolist() for b in itertools.islice(again.batches(start), 3)] == from_the_start[start:]


def test_every_epoch_holds_every_block_once_in_its_own_order() -> None:
    rows = torch.arange(40).view(20, 2)
    stream = [
        row for b in itertools.islice(BlockLoader(rows, 4, seed=1).batches(0), 15) for row in b["input_ids"][:, 0]
    ]
    epochs = [[int(row) // 2 for row in stream[first : first + 20]] for first in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    other = next(BlockLoader(rows, 4, seed=2).batches(0))["input_ids"]
    assert not torch.equal(other, next(BlockLoader(rows, 4, seed=1).batches(0))["input_ids"])
    in_order = next(BlockLoader(rows, 4, seed=None).batches(0))["input_ids"]
    assert in_order[:, 0].tolist() == [0, 2, 4, 6]


def test_a_text_file_comes_back_whole(source: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    blocks = read_blocks([str(source / "old.txt")], tokenizer, 16)
    text = (source / "old.txt").read_text()
    assert tokenizer.decode(blocks.tokens(0, blocks.num_tokens)) == text
    assert blocks.tokens(0, blocks.num_tokens).tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_rows_of_json_and_parquet_are_documents(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"body": "the cat sat", "n": 1}, {"body": "dogs bark", "n": 2}]
    file = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    blocks = read_blocks([str(file)], tokenizer, 2, text_column="body")
    assert tokenizer.decode(blocks.tokens(0, blocks.num_tokens)) == "the cat sat</s>dogs bark</s>"
    unended = read_blocks([str(file)], tokenizer, 2, text_column="body", append_eos=False)
    assert tokenizer.decode(unended.tokens(0, unended.num_tokens)) == "the cat satdogs bark"
    with pytest.raises(TrainingError, match="no column 'bdy' in the data. Did you mean 'body'"):
        read_blocks([str(file)], tokenizer, 2, text_column="bdy")


def test_lines_end_where_they_are_told_to(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("the cat\ndogs\n")
    blocks = read_blocks([str(file)], tokenizer, 2, append_eos=True)
    assert tokenizer.decode(blocks.tokens(0, blocks.num_tokens)) == "the cat\n</s>dogs\n</s>"


def test_a_local_dataset_directory_with_splits_is_read(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for split, words in (("train", "cat"), ("test", "dogs")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": words}) + "\n")
    rows = load_text(str(tmp_path), split="test")
    blocks = tokenize(rows, tokenizer, 2)
    assert tokenizer.decode(blocks.tokens(0, 99)) == "dogs</s>"


def test_bad_input_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.jsonl").write_text("{}")
    (tmp_path / "c.pdf").write_text("x")
    (tmp_path / "d.jsonl").write_text("no json")
    for files, message in (
        ([str(tmp_path / "nowhere.txt")], "no such file: .*nowhere.txt"),
        ([str(tmp_path / "*.xml")], r"no such file: .*\*\.xml"),
        ([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], "one kind only"),
        ([str(tmp_path / "c.pdf")], "cannot read .pdf; use .txt, .json, .jsonl, .parquet"),
        ([str(tmp_path / "d.jsonl")], "cannot read .*d.jsonl"),
    ):
        with pytest.raises(TrainingError, match=message):
            load_text(data_files=files)
    with pytest.raises(TrainingError, match="cannot load dataset 'no/such'"):
        load_text("no/such")
    with pytest.raises(TrainingError, match="batch_size must be >= 1, got 0"):
        BlockLoader(torch.zeros(2, 2), 0)
    with pytest.raises(TrainingError, match="1 tokens, less than one block of 64"):
        read_blocks([str(tmp_path / "a.txt")], tokenizer, 64)


def test_identity_tells_texts_and_orders_apart() -> None:
    rows = torch.arange(40).view(10, 4)
    base = BlockLoader(rows, 2, seed=1).identity()
    assert base == BlockLoader(TokenBlocks([rows.flatten()], 4), 2, seed=1).identity()
    others = [
        BlockLoader(rows + 1, 2, seed=1),
        BlockLoader(rows.view(5, 8), 2, seed=1),
        BlockLoader(rows, 3, seed=1),
        BlockLoader(rows, 2, seed=2),
        BlockLoader(rows, 2, seed=1, world_size=2),
    ]
    assert all(other.identity() != base for other in others)
    assert json.loads(json.dumps(base)) == base
