"""The configuration room: what a living model is built from, and the choices by which it lives.

Imports nothing else of living_moe, so every other room may import it.
"""

from living_moe.configuration.configuration_living_moe import FORMAT_VERSION, LivingMoeConfig
from living_moe.configuration.errors import (
    CheckpointError,
    ConfigurationError,
    ConversionError,
    LivingMoeError,
    OptimizerError,
    PopulationError,
    RecordsError,
    TrainingDivergedError,
    TrainingError,
    UnknownExpertError,
)
from living_moe.configuration.presets import PRESETS, Preset, preset_sections
from living_moe.configuration.sections import (
    ExpertsConfig,
    LifecycleConfig,
    PlasticityConfig,
    ReceptiveFieldConfig,
    RouterConfig,
    SynapseConfig,
    TrainableConfig,
    VitalsConfig,
)
from living_moe.configuration.slabs import SLABS, is_frozen, slab_name, tier_of

__all__ = [
    "FORMAT_VERSION",
    "PRESETS",
    "SLABS",
    "CheckpointError",
    "ConfigurationError",
    "ConversionError",
    "ExpertsConfig",
    "LifecycleConfig",
    "LivingMoeConfig",
    "LivingMoeError",
    "OptimizerError",
    "PlasticityConfig",
    "PopulationError",
    "Preset",
    "ReceptiveFieldConfig",
    "RecordsError",
    "RouterConfig",
    "SynapseConfig",
    "TrainableConfig",
    "TrainingDivergedError",
    "TrainingError",
    "UnknownExpertError",
    "VitalsConfig",
    "is_frozen",
    "preset_sections",
    "slab_name",
    "tier_of",
]
