"""Every error living_moe raises on purpose. All are `ValueError`s, so one `except` catches them.

A message says what was wrong, the value, and the remedy. Nothing is changed when one is raised.
"""


class LivingMoeError(ValueError):
    """Base class of all errors raised by living_moe."""


class ConfigurationError(LivingMoeError):
    """A config field is unknown, of the wrong type, or makes no sense with the others."""


class PopulationError(LivingMoeError):
    """An event cannot be applied to this population (too few, too many, wrong partners)."""


class UnknownExpertError(PopulationError):
    """A uid that never existed in this layer, or whose expert has died."""


class OptimizerError(LivingMoeError):
    """The optimizer is unsupported, or does not hold the model's present parameters."""


class CheckpointError(LivingMoeError):
    """A checkpoint is missing, truncated, incomplete, or does not fit its config."""


class ConversionError(LivingMoeError):
    """A source cannot be grafted, or a converted model does not reproduce its source."""


class RecordsError(LivingMoeError):
    """A run's records are missing, or what is there was not written by a run of living_moe."""


class TrainingError(LivingMoeError):
    """Training cannot start or go on."""


class TrainingDivergedError(TrainingError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""
