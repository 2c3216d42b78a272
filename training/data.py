"""Training text: read by `datasets`, tokenized, packed into blocks, served in an order that is a pure function.

Text of any length becomes one stream of tokens, cut into blocks of equal length: no padding, and every token trains
once per epoch but for the remainder at the stream's end. Which blocks a batch holds depends on (seed, batch number)
alone, so a run that resumes at batch n sees what the uninterrupted run saw, and many processes together see what one
process with their global batch would.

S tokens of a block, B sequences of a batch, N blocks.
"""

from __future__ import annotations

import glob
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from living_moe.configuration.errors import TrainingError
from living_moe.configuration.sections import did_you_mean

#: Loader of `datasets` for each kind of local file.
LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
#: Lines of a text file that are tokenized together: words and blank lines stay whole across line breaks.
LINES_PER_CHUNK = 1000


class TokenBlocks:
    """A stream of tokens seen as N blocks of S tokens.

    Args:
        parts: int tensors of one dimension, one after the other; memory-mapped ones are never copied as a whole.
        block_size: S.

    Raises:
        TrainingError: There is less than one block of text.
    """

    def __init__(self, parts: Sequence[Tensor], block_size: int):
        self.block_size = block_size
        self._parts = [part for part in parts if part.numel()]
        self._starts = np.cumsum([0, *(part.numel() for part in self._parts)])
        self.num_tokens = int(self._starts[-1])
        if len(self) == 0:
            raise TrainingError(
                f"the text has {self.num_tokens} tokens, less than one block of {block_size}; give more text or a "
                f"smaller block_size."
            )

    def __len__(self) -> int:
        return self.num_tokens // self.block_size

    def __getitem__(self, number: int) -> Tensor:
        """Block `number`, int64 (S,)."""
        if not 0 <= number < len(self):
            raise IndexError(f"block {number} of {len(self)}")
        return self.tokens(number * self.block_size, self.block_size)

    def tokens(self, start: int, length: int) -> Tensor:
        """`length` tokens (fewer at the end) from position `start` of the stream, int64."""
        part = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces: list[Tensor] = []
        while length > 0 and part < len(self._parts):
            first = start - int(self._starts[part])
            piece = self._parts[part][first : first + length]
            pieces.append(piece.to(torch.int64))
            start, length, part = start + piece.numel(), length - piece.numel(), part + 1
        return torch.cat(pieces)

    def fingerprint(self) -> str:
        """Tells other text, or the same text cut otherwise, apart: a hash of the sizes and of blocks spread over it."""
        digest = hashlib.sha256(f"{self.num_tokens},{self.block_size}".encode())
        for number in np.linspace(0, len(self) - 1, min(len(self), 16)).round().astype(int).tolist():
            digest.update(self[number].numpy().tobytes())
        return digest.hexdigest()[:16]


class BlockLoader:
    """Batches of blocks, without end, in an order that is a pure function of the seed.

    The blocks of epoch 0 in an order drawn from (seed, 0), then those of epoch 1, and so on; batches are cut from that
    endless sequence, so no block is dropped at an epoch's end. Of every `world_size` consecutive batches this process
    takes the one of its rank.

    Args:
        blocks: `TokenBlocks`, or a tensor (N, S) of token ids.
        batch_size: B, sequences per batch and process.
        seed: Of the order; None keeps the blocks' own order.
        rank, world_size: This process among those that train together.
    """

    def __init__(
        self,
        blocks: TokenBlocks | Tensor,
        batch_size: int,
        *,
        seed: int | None = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 1:
            raise TrainingError(f"batch_size must be >= 1, got {batch_size}.")
        self.blocks = blocks
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._order: tuple[int, Tensor] | None = None

    def batches(self, start: int) -> Iterator[dict[str, Tensor]]:
        """This process's batches from its batch number `start` on: input_ids and labels, int64 (B, S)."""
        number = start
        while True:
            first = (number * self.world_size + self.rank) * self.batch_size
            ids = torch.stack([self.blocks[self._block_at(first + n)] for n in range(self.batch_size)]).to(torch.int64)
            yield {"input_ids": ids, "labels": ids}
            number += 1

    def identity(self) -> dict[str, Any]:
        """What decides the order of the data; a run resumes with the same only."""
        blocks = self.blocks
        if isinstance(blocks, Tensor):
            blocks = TokenBlocks([blocks.reshape(-1)], blocks.shape[1])
        return {
            "text": blocks.fingerprint(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "processes": self.world_size,
        }

    def _block_at(self, position: int) -> int:
        epoch, place = divmod(position, len(self.blocks))
        if self.seed is None:
            return place
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_mixed(self.seed, epoch))
            self._order = (epoch, torch.randperm(len(self.blocks), generator=generator))
        return int(self._order[1][place])


def _mixed(*numbers: int) -> int:
    """One 62-bit seed from several numbers; neighbours give unrelated seeds."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def load_text(
    dataset: str | None = None,
    *,
    config: str | None = None,
    split: str = "train",
    data_files: Sequence[str] = (),
) -> datasets.Dataset:
    """Rows of text from the hub or from local files.

    Args:
        dataset: Hub id or local directory, as `datasets.load_dataset` takes it.
        config: Its configuration.
        split: Which split, slices allowed ("train[:10%]").
        data_files: Local files instead, all of one kind: .txt (a row per line, line breaks kept), .json, .jsonl,
            .parquet. Patterns with `*` are expanded.

    Raises:
        TrainingError: Nothing there, files of several or unknown kinds, or `datasets` cannot read it.
    """
    if dataset is not None:
        try:
            return datasets.load_dataset(dataset, config, split=split)
        except Exception as error:  # its loaders raise errors of every kind: network, script, parser, split
            raise TrainingError(f"cannot load dataset {dataset!r}: {error}") from error
    files = expand(data_files)
    kinds = sorted({Path(file).suffix.lower() for file in files})
    if len(kinds) != 1:
        raise TrainingError(f"files of one kind only can be read together, got {', '.join(kinds)}; convert some.")
    if kinds[0] not in LOADERS:
        raise TrainingError(f"{files[0]}: cannot read {kinds[0] or 'a file without suffix'}; use {', '.join(LOADERS)}.")
    options: dict[str, Any] = {"keep_linebreaks": True} if LOADERS[kinds[0]] == "text" else {}
    try:
        return datasets.load_dataset(LOADERS[kinds[0]], data_files={"train": files}, split=split, **options)
    except Exception as error:  # see above
        raise TrainingError(f"cannot read {', '.join(files)}: {error}") from error


def expand(patterns: Sequence[str]) -> list[str]:
    """Existing files, in a fixed order; patterns with `*` are expanded."""
    files: list[str] = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not found or not all(Path(file).is_file() for file in found):
            raise TrainingError(f"no such file: {pattern}.")
        files += found
    return files


def tokenize(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    text_column: str = "text",
    append_eos: bool | None = None,
    lines: bool = False,
) -> TokenBlocks:
    """Text as blocks of tokens.

    Args:
        rows: From `load_text`.
        tokenizer: Adds no special tokens of its own here.
        block_size: S.
        text_column: Column of the text.
        append_eos: End every row with the EOS token (if the tokenizer has one); None does unless the rows are `lines`.
        lines: Rows are lines of text files; they are tokenized many at a time, as the running text they are.

    Raises:
        TrainingError: No such column, or too little text.
    """
    if text_column not in rows.column_names:
        raise TrainingError(f"no column {text_column!r} in the data.{did_you_mean(text_column, rows.column_names)}")
    eos = tokenizer.eos_token_id if (not lines if append_eos is None else append_eos) else None
    whole = lines and eos is None

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = ["".join(batch[text_column])] if whole else batch[text_column]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return {"input_ids": [ids if eos is None else [*ids, eos] for ids in encoded]}

    tokens = rows.map(
        encode,
        batched=True,
        batch_size=LINES_PER_CHUNK,
        remove_columns=rows.column_names,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
        desc="tokenizing",
    )
    return TokenBlocks(_flat(tokens), block_size)


def _flat(tokens: datasets.Dataset) -> list[Tensor]:
    """The column of token ids as flat tensors that share the dataset's memory-mapped buffers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to it
        return [
            torch.from_numpy(chunk.flatten().to_numpy(zero_copy_only=True))
            for chunk in tokens.data.column("input_ids").chunks
        ]


def read_blocks(
    data_files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    split: str = "train",
    text_column: str = "text",
    append_eos: bool | None = None,
) -> TokenBlocks:
    """Blocks of local files: `load_text`, then `tokenize`."""
    files = expand(data_files)
    lines = all(Path(file).suffix.lower() == ".txt" for file in files)
    rows = load_text(data_files=files, split=split)
    return tokenize(rows, tokenizer, block_size, text_column=text_column, append_eos=append_eos, lines=lines)


__all__ = ["BlockLoader", "TokenBlocks", "expand", "load_text", "read_blocks", "tokenize"]
