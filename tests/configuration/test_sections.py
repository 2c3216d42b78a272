"""A section takes what makes sense, and names the field, the value and the remedy of what does not."""

import copy
import pickle

import pytest

from living_moe.configuration import ConfigurationError, LifecycleConfig, VitalsConfig
from living_moe.configuration.sections import SECTIONS, Section

EVERY_SECTION = pytest.mark.parametrize("section", SECTIONS.values(), ids=list(SECTIONS))


@EVERY_SECTION
def test_a_section_survives_dict_copy_and_pickle(section: type[Section]) -> None:
    original = section()
    assert section.from_value(original.to_dict()) == original
    assert copy.deepcopy(original) == original
    assert pickle.loads(pickle.dumps(original)) == original


def test_a_section_made_from_an_instance_is_another_one() -> None:
    original = LifecycleConfig(interval=7)
    made = LifecycleConfig.from_value(original)
    made.interval = 8
    assert original.interval == 7


def test_no_value_and_a_partial_dict_take_the_defaults() -> None:
    assert LifecycleConfig.from_value(None) == LifecycleConfig()
    assert LifecycleConfig.from_value({"interval": 5}) == LifecycleConfig(interval=5)


def test_a_misspelt_field_is_refused_with_a_suggestion_however_it_comes() -> None:
    message = r"unknown field lifecycle\.intervall\. Did you mean 'interval'\?"
    with pytest.raises(ConfigurationError, match=message):
        LifecycleConfig(intervall=5)  # type: ignore[call-arg]
    with pytest.raises(ConfigurationError, match=message):
        LifecycleConfig.from_value({"intervall": 5})
    section = LifecycleConfig()
    with pytest.raises(ConfigurationError, match=message):
        section.intervall = 5  # type: ignore[attr-defined]


def test_an_unknown_field_far_from_all_lists_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown field vitals\.zzz\. Known: decay, .*, slow_decay\."):
        VitalsConfig.from_value({"zzz": 1})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("interval", 0, r"lifecycle\.interval must be >= 1, got 0"),
        ("interval", "5", r"lifecycle\.interval must be int, got '5'"),
        ("interval", 5.0, r"lifecycle\.interval must be int, got 5\.0"),
        ("interval", True, r"lifecycle\.interval must be int, got True"),
        ("enabled", 1, r"lifecycle\.enabled must be bool, got 1"),
        ("max_experts", "8", r"lifecycle\.max_experts must be int or None, got '8'"),
        ("noise_std", -1.0, r"lifecycle\.noise_std must be >= 0, got -1\.0"),
        ("split_load", float("nan"), r"lifecycle\.split_load must be a finite float, got nan"),
        ("split_load", float("inf"), r"lifecycle\.split_load must be a finite float, got inf; a large number"),
        ("death_load", 0.9, r"lifecycle\.split_load must be > 2 \* lifecycle\.death_load"),
    ],
)
def test_a_value_without_sense_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LifecycleConfig.from_value({field: value})


def test_a_whole_number_is_a_float_where_floats_are_taken() -> None:
    assert isinstance(LifecycleConfig.from_value({"split_load": 2}).split_load, float)


def test_anything_but_a_dict_or_an_instance_is_no_section() -> None:
    with pytest.raises(ConfigurationError, match="vitals must be a dict of its fields, got 3"):
        VitalsConfig.from_value(3)  # type: ignore[arg-type]
