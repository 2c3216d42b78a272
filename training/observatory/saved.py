"""A snapshot of a living model's experts, from a model in memory or from a checkpoint's small tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from living_moe.configuration import LivingMoeConfig
from living_moe.configuration.errors import CheckpointError
from living_moe.configuration.sections import PlasticityConfig
from living_moe.configuration.slabs import is_frozen, tier_of
from living_moe.modeling_living_moe import LivingMoeForCausalLM, LivingMoePreTrainedModel
from living_moe.modeling_living_moe.block import LivingMoeBlock
from living_moe.modeling_living_moe.checkpoint import check_files, check_population
from living_moe.modeling_living_moe.vitals import ECONOMY, SHOWN
from living_moe.training.observatory.vitals_log import Array, Snapshot

#: Parts of a tensor's name that mark the small tables read from disk.
_TABLES = (".population.", ".vitals.", ".drift.", ".clock.", ".plasticity.")
_KEYS = ".router.keys."
#: Directions on which keys are noted, and the seed they are drawn from: the same in every run.
KEY_DIRECTIONS, _KEY_SEED = 8, 20170123


def load_tables(path: str | Path, *, keys: bool = False) -> LivingMoeForCausalLM:
    """A checkpoint's model with populations, vitals and phase, but without weights (they stay on the meta device).

    Args:
        keys: Read the routers' keys as well.

    Raises:
        CheckpointError: Not a living checkpoint, or a damaged one.
        ConfigurationError: Its config.json does not fit this version.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; a checkpoint on disk is needed.")
    check_files(directory)
    config = LivingMoeConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = LivingMoeForCausalLM(config)
    for name, tensor in read_tables(directory, keys=keys).items():
        owner_name, _, leaf = name.rpartition(".")
        try:
            owner: nn.Module = model.get_submodule(owner_name)
        except AttributeError as error:
            raise CheckpointError(f"{directory}: tensor {name} does not fit its config.json.") from error
        if _KEYS in name:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[leaf] = tensor
    for block in model.living_blocks:
        block.population.stale()
        check_population(block.population, block.layer, block.router.scoring.top_k)
    model.apply_trainability()
    return model


def read_tables(directory: Path, *, keys: bool = False) -> dict[str, Tensor]:
    """The small per-slot tables of a checkpoint, and the routers' keys if asked for."""
    wanted = (*_TABLES, _KEYS) if keys else _TABLES
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        shards = [SAFE_WEIGHTS_NAME]
    tables: dict[str, Tensor] = {}
    for shard in shards:
        with safe_open(directory / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                if any(part in name for part in wanted):
                    tables[name] = file.get_tensor(name)
    return tables


@torch.no_grad()
def snapshot_of(model: LivingMoePreTrainedModel) -> Snapshot:
    """All experts of a model now. One transfer from each device that layers are on.

    Keys are noted on a few fixed random directions, so that their paths can be drawn; those of a model without weights
    are left out.
    """
    blocks = model.living_blocks
    by_device: dict[torch.device, list[int]] = {}
    for place, block in enumerate(blocks):
        by_device.setdefault(block.population.next_uid.device, []).append(place)
    rows: dict[int, Array] = {}
    names: list[str] = []
    for places in by_device.values():
        columns = [_measurements(blocks[place], model.config.plasticity) for place in places]
        names = list(columns[0])
        stacked = torch.cat([torch.stack([column.float() for column in found.values()]) for found in columns], dim=1)
        counts = [len(blocks[place].population.members) for place in places]
        host = stacked.cpu().numpy()
        rows.update(zip(places, np.split(host, np.cumsum(counts)[:-1], axis=1), strict=True))
    identities = [_identities(block) for block in blocks]
    orders = [np.argsort(table[0], kind="stable") for table in identities]
    exact = np.concatenate([table[:, order] for table, order in zip(identities, orders, strict=True)], axis=1)
    measured = np.concatenate([rows[place][:, order] for place, order in enumerate(orders)], axis=1)
    layer_E = np.repeat(np.arange(len(blocks), dtype=np.int32), [table.shape[1] for table in identities])
    return Snapshot(
        model.steps_lived,
        layer_E,
        dict(zip(("uid", "clade", "field", "tier", "frozen", "parent", "born"), exact, strict=True))
        | dict(zip(names, measured, strict=True)),
    )


def _identities(block: LivingMoeBlock) -> Array:
    """int64 (7, E) in slot order, from what the host knows already."""
    members = block.population.members
    rows: list[Sequence[int]] = [
        (m.uid, m.clade, m.field, tier_of(m.slab), int(is_frozen(m.slab)), m.parent, m.born) for m in members
    ]
    return np.array(rows, np.int64).T


def pull_left(usage_E: Tensor, forces: PlasticityConfig) -> Tensor:
    """How much of the way to a query one hit would still move each key, fp32 (E,): alpha over the expert's mass."""
    alpha = forces.alpha if forces.use_alpha else 0.0
    return alpha / (1.0 + usage_E.float() * forces.use_inertia)


def _measurements(block: LivingMoeBlock, forces: PlasticityConfig) -> dict[str, Tensor]:
    """Columns (E,) of a layer, in slot order."""
    alive = block.population.alive
    found = {
        name: torch.cat([getattr(block.vitals.table(slab), name)[:count] for slab, count in alive.items()])
        for name in (SHOWN if block.router.synapse is None else SHOWN + ECONOMY)
    }
    keys_ED = block.router.keys(alive).detach()
    if (memory := block.plasticity) is not None:
        tables = [(memory.table(slab), count) for slab, count in alive.items()]
        used = "hits" if forces.usage == "count" else "use"
        usage_E = torch.cat([getattr(table, used)[:count] for table, count in tables])
        found["plasticity"] = pull_left(usage_E, forces)
        found["drift"] = memory.distances(block.router.keys, block.population)
    if keys_ED.device.type != "meta":
        on_directions = keys_ED.float() @ key_directions(keys_ED.shape[1]).to(keys_ED.device)
        found |= {f"key_{place}": column for place, column in enumerate(on_directions.T)}
    return found


def key_directions(d_key: int) -> Tensor:
    """The directions keys are noted on, fp32 (D, KEY_DIRECTIONS): random, of expected length 1 per key's own."""
    generator = torch.Generator().manual_seed(_KEY_SEED)
    return torch.randn(d_key, KEY_DIRECTIONS, generator=generator) / KEY_DIRECTIONS**0.5


__all__ = ["KEY_DIRECTIONS", "key_directions", "load_tables", "read_tables", "snapshot_of"]
