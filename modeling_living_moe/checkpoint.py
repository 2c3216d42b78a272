"""Saving and loading: exactly the living, all of it, or a clear error.

A checkpoint holds the alive experts only (spare slots are dropped), with per-layer sizes in `config.json`, identity and
vitals as tensors, and events in `lineage.jsonl`. It is written apart and moved to its destination when complete.
Loading is strict: a missing, extra, mis-shaped or truncated tensor is an error that names it. safetensors only.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from living_moe.configuration.errors import CheckpointError, LivingMoeError
from living_moe.configuration.slabs import SLABS, is_frozen
from living_moe.modeling_living_moe.alignment import align
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.escape.module import Now
from living_moe.modeling_living_moe.lifecycle.lineage import LINEAGE_NAME, Lineage
from living_moe.modeling_living_moe.lifecycle.surgery import require_optimizer, retire
from living_moe.modeling_living_moe.plasticity.state import PlasticityTable
from living_moe.modeling_living_moe.population import NOBODY, IdentityTable, Population
from living_moe.modeling_living_moe.synapse.postsynaptic import ROW_TENSORS
from living_moe.modeling_living_moe.synapse.presynaptic import MOLECULES
from living_moe.modeling_living_moe.vitals import VitalsTable

CARD_NAME = "README.md"
#: Marks a card as ours to rewrite; a card without it is the user's and is kept.
CARD_MARK = "<!-- written by living_moe from the model's own records -->"

#: Writes the text of a model card. Registered by the package door (this room must not import model_cards).
CardWriter = Callable[[Any, Path], str]
_card_writer: CardWriter | None = None


def set_card_writer(writer: CardWriter) -> None:
    global _card_writer
    _card_writer = writer


class CheckpointMixin:
    """Strict `from_pretrained`, atomic `save_pretrained`, self-describing `load_state_dict`."""

    config: Any
    living_blocks: list[LivingMoeBlock]

    # -- saving ----------------------------------------------------------------------------------------------------

    def compact_state_dict(self, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The state dict with alive rows only."""
        full = dict(self.state_dict() if state_dict is None else state_dict)  # type: ignore[attr-defined]
        for prefix, block in self._named_blocks():
            for slab in block.population.slabs:
                count = block.population.alive.get(slab, 0)
                for name in _row_names(slab):
                    if (key := prefix + name) in full:
                        full[key] = full[key][:count]
                        if not count:
                            del full[key]
            if (key := f"{prefix}population.slab_sizes") in full:
                alive = [block.population.alive.get(slab, 0) for slab in SLABS]
                full[key] = torch.tensor(alive, device=full[key].device)
        return full

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As Transformers' `save_pretrained`, plus per-layer populations, lineage and a model card.

        Nothing in `save_directory` changes before the new checkpoint is complete; other files there stay.

        Raises:
            CheckpointError: `save_directory` is a file.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(  # type: ignore[misc]
                save_directory,
                is_main_process=is_main_process,
                state_dict=state_dict,
                push_to_hub=push_to_hub,
                **kwargs,
            )
            return
        if not is_main_process:
            return
        target = Path(os.path.abspath(save_directory))
        if target.is_file():
            raise CheckpointError(f"{target} is a file; save_pretrained needs a directory.")
        hub = {
            name: kwargs.pop(name) for name in ("repo_id", "commit_message", "private", "create_pr") if name in kwargs
        }
        compact = self.compact_state_dict(state_dict)
        kwargs["save_original_format"] = False
        with staged_directory(target) as stage, self._compact_config():
            super().save_pretrained(stage, state_dict=compact, **kwargs)  # type: ignore[misc]
            self.lineage.save(stage / LINEAGE_NAME)  # type: ignore[attr-defined]
            if _card_writer is not None and not _is_foreign_card(target / CARD_NAME):
                (stage / CARD_NAME).write_text(_card_writer(self, target), encoding="utf-8")
        if push_to_hub:
            hub.setdefault("repo_id", target.name)
            self.push_to_hub(token=kwargs.get("token"), **hub)  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def _compact_config(self) -> Iterator[None]:
        full = self.config.populations
        self.config.populations = [
            {**{k: v for k, v in sizes.items() if k not in SLABS}, **block.population.alive}
            for sizes, block in zip(full, self.living_blocks, strict=True)
        ]
        try:
            yield
        finally:
            self.config.populations = full

    # -- loading ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[no-untyped-def]
        cls, pretrained_model_name_or_path, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ):
        """As Transformers' `from_pretrained`, but strict.

        On CPU weights are in memory of their own, not views of the mapped file: the loaded model computes exactly what
        the saved one did (`alignment.py`).

        Raises:
            CheckpointError: A shard is missing or truncated; a tensor is missing, unexpected or mis-shaped; the tables
                do not describe a population; the lineage is broken. Each names the thing.
        """
        path = pretrained_model_name_or_path
        if kwargs.get("offload_buffers"):
            raise CheckpointError(
                "offload_buffers=True would offload the tables of the populations, which are read at any time and are "
                "small; leave it out."
            )
        # Not to be lenient: with it Transformers reports the tensors by name, and the check below refuses them.
        kwargs["ignore_mismatched_sizes"] = True
        if path is not None and os.path.isdir(os.path.join(path, kwargs.get("subfolder", ""))):
            check_files(Path(path) / kwargs.get("subfolder", ""), kwargs.get("variant"))
        try:
            model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        except LivingMoeError:
            raise
        except (SafetensorError, RuntimeError) as error:
            # No fault of the checkpoint: too little memory, or a context that makes every tensor a meta tensor.
            if "out of memory" in str(error).lower() or torch.empty(0).is_meta:
                raise
            raise CheckpointError(f"cannot load {path}: {error}") from error
        problems = [
            f"{what}: {', '.join(sorted(map(str, info[key]))[:8])}"
            for key, what in (
                ("missing_keys", "missing tensors"),
                ("unexpected_keys", "unexpected tensors"),
                ("mismatched_keys", "tensors of another shape"),
                ("error_msgs", "errors"),
            )
            if info.get(key)
        ]
        if problems:
            raise CheckpointError(
                f"{path} does not fit its config.json ({'; '.join(problems)}). The checkpoint is incomplete or was "
                f"edited; convert or download it again."
            )
        for block in model.living_blocks:
            block.population.stale()
            check_population(block.population, block.layer, block.router.scoring.top_k)
            if block.escape is not None:
                Now.of(*(getattr(block.escape, name) for name in Now._fields))
        if path is not None:
            model._life.lineage_ = _read_lineage(path, kwargs)
        model.apply_trainability()
        align(model)
        return (model, info) if output_loading_info else model

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module.load_state_dict`; the slabs first take the sizes the state dict has.

        So a model of the same backbone takes up any population. Parameters that change size are replaced: build the
        optimizer after this call.

        Raises:
            CheckpointError: Experts are packed in the state dict and not in the model, or the other way round.
        """
        for prefix, block in self._named_blocks():
            check_kinds(block, prefix, state_dict)
        retired: list[nn.Parameter] = []
        before = {id(parameter) for parameter in self._replaceable()}
        for prefix, block in self._named_blocks():
            retired += adopt_sizes(block, prefix, state_dict)
        retired += self._adopt_fields(state_dict)
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)  # type: ignore[misc]
        retire(retired)
        require_optimizer(self, [parameter for parameter in self._replaceable() if id(parameter) not in before])  # type: ignore[arg-type]
        for block in self.living_blocks:
            block.population.stale()
            block.vitals.forget()
            if block.plasticity is not None:
                block.plasticity.evidence = []
            if block.postsynaptic is not None:
                block.postsynaptic.forget()
        self._life._steps = None  # type: ignore[attr-defined]
        self._life.drift.take()  # type: ignore[attr-defined]
        self.record_populations()  # type: ignore[attr-defined]
        return result

    def _replaceable(self) -> list[nn.Parameter]:
        """Parameters that come and go with events."""
        life = self._life  # type: ignore[attr-defined]
        slots = [slot.parameter for slot in self.slot_parameters()]  # type: ignore[attr-defined]
        return slots + [parameter for delta in life.deltas() for parameter in delta.parameters()]

    def _adopt_fields(self, state_dict: Mapping[str, Any]) -> list[nn.Parameter]:
        """Have as many receptive fields as a state dict; returns the parameters that left."""
        life = self._life  # type: ignore[attr-defined]
        counts = next((state_dict[name] for name in state_dict if name.endswith("fields.new_counts")), None)
        if life.fields is None or counts is None or len(counts) == life.fields.num_fields:
            return []
        left = [p for delta in life.deltas() for maps in (delta.down, delta.up) for p in maps[len(counts) :]]
        for delta in life.deltas():
            for number in range(delta.num_fields, len(counts)):
                delta.append(*delta.new_field(number))
            delta.keep(len(counts))
        life.fields.resize_fields(len(counts))
        return left

    def apply_trainability(self) -> None:
        """Set `requires_grad` from the config: frozen slabs never, everything else as the section `trainable` says."""
        choices = self.config.trainable
        slots = {id(slot.parameter): slot for slot in self.slot_parameters()}  # type: ignore[attr-defined]
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            slot = slots.get(id(parameter))
            if slot is not None:
                frozen = is_frozen(slot.slab)
                keys = choices.frozen_keys if frozen else choices.keys
                expression = choices.synapses and (choices.frozen_keys or not frozen)
                trainable = {"key": keys, "expression": expression}.get(slot.role, not frozen)
            else:
                concern = next((c for part, c in _CONCERNS if part in f".{name}"), "mlps")
                trainable = concern is None or getattr(choices, concern)
            parameter.requires_grad_(trainable)

    def _named_blocks(self) -> list[tuple[str, LivingMoeBlock]]:
        blocks = {id(block) for block in self.living_blocks}
        return [(f"{name}.", m) for name, m in self.named_modules() if id(m) in blocks]  # type: ignore[attr-defined]


#: What part of a parameter's name tells which field of the section `trainable` it falls under; None always trains.
_CONCERNS: tuple[tuple[str, str | None], ...] = (
    ("field_deltas.", None),
    ("head_delta.", None),
    (".escape.", None),
    (".router.query.", "query_networks"),
    (".router.learned_temperature.", "query_networks"),
    (".router.synapse.", "synapses"),
    (".embed_tokens.", "embeddings"),
    (".lm_head.", "head"),
    (".self_attn.synapse.", "synapses"),
    (".self_attn.", "attention"),
    ("norm.", "norms"),
)
#: Tables of a population whose sizes change with its events.
_TABLES = (
    "facet_normal", "facet_offset", "leaf_uid", "leaf_path", "tombstone_place", "tombstone_key", "tombstone_bias",
)  # fmt: skip


#: Tensors of a slab with parameters, and of a packed one.
_FLOAT = ("gate_up_proj", "down_proj")
_PACKED = ("gate_up_packed", "gate_up_scale", "down_packed", "down_scale")


def _row_names(slab: str) -> list[str]:
    names = [f"experts.{slab}.{name}" for name in (*_FLOAT, *_PACKED)]
    names += [f"router.keys.{slab}", f"router.synapse.expression.{slab}"]
    names += [f"population.{slab}.{column}" for column in IdentityTable.columns]
    names += [f"vitals.{slab}.{column}" for column in VitalsTable.columns]
    names += [f"plasticity.{slab}.{column}" for column in (*PlasticityTable.columns, "start")]
    return names + [f"postsynaptic.{slab}.{column}" for column in ROW_TENSORS]


def check_kinds(block: LivingMoeBlock, prefix: str, state_dict: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where a state dict has packed experts and the block has none, or the other way round."""
    for slab in SLABS:
        packed = block.experts.is_packed(slab)
        if any(f"{prefix}experts.{slab}.{name}" in state_dict for name in (_FLOAT if packed else _PACKED)):
            kinds = ("latent", "packed") if packed else ("packed", "not packed")
            remedy = "unpack_experts() first" if packed else "ternarize() and model.pack_experts() first"
            raise CheckpointError(
                f"layer {block.layer}, slab {slab!r}: the experts of this state dict are {kinds[0]}, the model's are "
                f"{kinds[1]}; call model.{remedy}, or load the checkpoint with from_pretrained."
            )


def adopt_sizes(block: LivingMoeBlock, prefix: str, state_dict: Mapping[str, Any]) -> list[nn.Parameter]:
    """Give a block the slab capacities and tables of a state dict; returns the parameters that were replaced.

    A state dict may be one shard of several, in any order: a slab goes only when `slab_sizes` says that it is empty.
    """
    replaced: list[nn.Parameter] = []
    like = next(iter(block.slot_parameters())).parameter
    device, dtype = like.device, like.dtype
    sizes = state_dict.get(f"{prefix}population.slab_sizes")
    for number, slab in enumerate(SLABS):
        rows = [state_dict[prefix + name].shape[0] for name in _row_names(slab) if prefix + name in state_dict]
        now = block.population.capacity(slab)
        wanted = rows[0] if rows else now if sizes is None else int(sizes[number])
        if wanted == now:
            continue
        if now:
            replaced += [slot.parameter for slot in block.slot_parameters() if slot.slab == slab]
            for owner in (block.experts, block.population, block.vitals, block.plasticity, block.postsynaptic):
                if owner is not None:
                    del owner._modules[slab]
            del block.router.keys[slab]
            if block.router.synapse is not None:
                del block.router.synapse.expression[slab]
        if wanted:
            module = block.experts.new_slab(slab, wanted).to(device, dtype)
            module.train(block.training)
            block.experts.add_module(slab, module)
            block.population.add_module(slab, IdentityTable(wanted).to(device))
            block.vitals.add_module(slab, VitalsTable(wanted).to(device))
            if block.plasticity is not None:
                block.plasticity.add_module(slab, PlasticityTable(wanted, block.router.d_key).to(device))
            if block.postsynaptic is not None:
                block.postsynaptic.add_module(slab, block.postsynaptic.new_table(slab, wanted).to(device))
            keys = block.router.new_keys(slab, wanted)
            block.router.keys[slab] = nn.Parameter(keys.detach().to(device, dtype), requires_grad=keys.requires_grad)
            if block.router.synapse is not None:
                vectors = torch.zeros(wanted, len(MOLECULES), device=device, dtype=dtype)
                trains = block.router.trains(slab, "expression")
                block.router.synapse.expression[slab] = nn.Parameter(vectors, requires_grad=trains)
    if block.router.synapse is not None:
        tensor = state_dict.get(f"{prefix}router.synapse.tombstones.expression")
        if tensor is not None and tensor.shape != block.router.synapse.tombstones.expression.shape:
            block.router.synapse.tombstones.expression = torch.zeros_like(tensor, device=device)
    for name in _TABLES:
        tensor = state_dict.get(f"{prefix}population.{name}")
        if tensor is not None and tensor.shape != getattr(block.population, name).shape:
            setattr(block.population, name, torch.zeros_like(tensor, device=device))
    block.population.stale()
    return replaced


def check_population(population: Population, layer: int, top_k: int) -> None:
    """Raise `CheckpointError` unless the tables describe a population that can route a token."""
    for slab in population.slabs:
        uids = population.table(slab).uid.tolist()
        alive = next((n for n, uid in enumerate(uids) if uid < 0), len(uids))
        if any(uid >= 0 for uid in uids[alive:]):
            raise CheckpointError(f"layer {layer}, slab {slab!r}: alive slots are not a prefix: uids {uids}.")
    uids = population.uids
    sizes = [population.capacity(slab) for slab in SLABS]
    if population.slab_sizes.tolist() != sizes:
        raise CheckpointError(f"layer {layer}: slab_sizes are {population.slab_sizes.tolist()}, the slabs {sizes}.")
    if len(set(uids)) != len(uids) or any(uid >= int(population.next_uid) for uid in uids):
        raise CheckpointError(f"layer {layer}: uids {uids} repeat or exceed next_uid {int(population.next_uid)}.")
    strangers = {leaf.uid for leaf in population.leaves} - {address.uid for address in population.addresses}
    if strangers:
        raise CheckpointError(f"layer {layer}: facet leaves belong to unknown uids {sorted(strangers)}.")
    strangers = {tombstone.heir for tombstone in population.tombstones} - {NOBODY, *uids}
    if strangers:
        raise CheckpointError(f"layer {layer}: heirs with unknown uids {sorted(strangers)}.")
    if population.num_open() < top_k:
        raise CheckpointError(f"layer {layer}: {population.num_open()} clades cannot serve top_k {top_k}.")


def check_files(directory: Path, variant: str | None = None) -> None:
    """Raise `CheckpointError` if a checkpoint's weight files are missing or truncated; reads headers only."""

    def named(name: str) -> str:
        stem, _, suffix = name.rpartition(".")
        return f"{stem}.{variant}.{suffix}" if variant else name

    index = directory / named(SAFE_WEIGHTS_INDEX_NAME)
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not a shard index: {error}.") from error
    else:
        shards = [named(SAFE_WEIGHTS_NAME)]
    if not (directory / CONFIG_NAME).is_file():
        raise CheckpointError(f"{directory} has no config.json: not a checkpoint, or an interrupted save.")
    for shard in shards:
        file = directory / shard
        if not file.is_file():
            raise CheckpointError(f"{directory}: weight file {shard} is missing.")
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}.") from error


def _read_lineage(path: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> Lineage:
    passed = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "subfolder") if kwargs.get(name)}
    file = cached_file(
        path,
        LINEAGE_NAME,
        local_files_only=bool(kwargs.get("local_files_only", False)),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **passed,
    )
    return Lineage() if file is None else Lineage.load(Path(file))


def _is_foreign_card(path: Path) -> bool:
    return path.is_file() and CARD_MARK not in path.read_text(encoding="utf-8", errors="replace")


#: Files a save replaces, with or without a variant's name; anything else in the directory is somebody else's.
_OURS = re.compile(
    r"model(\.[\w-]+)?(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(\.[\w-]+)?\.json"
    r"|(generation_)?config\.json|lineage\.jsonl"
)
#: Where a save puts its files until they are complete; one that an earlier, killed save left is removed.
_STAGE_PREFIX = ".save-"


@contextlib.contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """A new directory whose files take the place of the checkpoint in `target` when the block ends without an error.

    Until then that checkpoint is untouched. Then files are renamed one by one: `config.json`, without which nothing
    loads, is the first to go and the last to come. After an error all is as before. If the process is killed in
    between, `target` does not load (rather than wrongly), and the old files are in `.save-*/old`. The stage is inside
    `target` because that may be a mount point or the working directory, which cannot be renamed.
    """
    created = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=_STAGE_PREFIX, dir=target))
    try:
        (work / "new").mkdir()
        (work / "old").mkdir()
        yield work / "new"
        _swap(target, work)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        if created:
            with contextlib.suppress(OSError):
                target.rmdir()
        raise
    for stage in target.glob(f"{_STAGE_PREFIX}*"):
        shutil.rmtree(stage, ignore_errors=True)


def _swap(target: Path, work: Path) -> None:
    """Move the checkpoint in `target` to `work/old` and `work/new` to `target`; undone by an error."""
    arriving = sorted((work / "new").iterdir(), key=lambda file: file.name == CONFIG_NAME)
    names = {file.name for file in arriving}
    leaving = [file for file in target.iterdir() if _OURS.fullmatch(file.name) or file.name in names]
    leaving.sort(key=lambda file: file.name != CONFIG_NAME)
    moves = [(file, work / "old" / file.name) for file in leaving] + [(file, target / file.name) for file in arriving]
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in moves:
            source.rename(destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            destination.rename(source)
        raise


__all__ = ["CheckpointMixin", "check_files", "set_card_writer"]
