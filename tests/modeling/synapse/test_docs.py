"""docs/synapse.md keeps up with the code: a row for every molecule, and every test and name it tells of exists."""

import re
from pathlib import Path

import pytest

from living_moe.configuration.sections import LifecycleConfig, PlasticityConfig, SynapseConfig
from living_moe.modeling_living_moe.synapse.postsynaptic import SHOWN
from living_moe.modeling_living_moe.synapse.presynaptic import MOLECULES

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "synapse.md").read_text(encoding="utf-8")


def rows() -> list[list[str]]:
    """Cells of the rows of both tables of molecules."""
    found, inside = [], False
    for line in TEXT.splitlines():
        inside = line.startswith("| molecule") or (inside and line.startswith("|"))
        if inside and not line.startswith(("| molecule", "| ---")):
            found.append([cell.strip() for cell in line.strip("| ").split(" | ")])
    return found


@pytest.mark.parametrize("name", [*MOLECULES, *SHOWN])
def test_every_molecule_has_a_row_of_symbol_equation_code_and_test(name: str) -> None:
    mine = [row for row in rows() if f"`{name}`" in row[3]]
    assert len(mine) == 1
    assert len(mine[0]) == 5 and all(mine[0])
    assert re.search(r"`test_\w+`", mine[0][4])


def test_every_test_that_is_named_exists() -> None:
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
    }
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    assert len(named) > 20 and named <= defined, named - defined


def test_every_field_that_is_named_exists() -> None:
    for section in (SynapseConfig, LifecycleConfig, PlasticityConfig):
        named = set(re.findall(rf"`{section.section_name}\.(\w+)[`=]", TEXT))
        assert named <= set(section.field_names()), named
