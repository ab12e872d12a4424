"""The tables of models name every registered architecture and every format that it reads."""

from pathlib import Path
import re

from grit_jax.models import ARCHITECTURES

ROOT = Path(__file__).parents[2]


def rows(path, heading):
    """Returns the code in each cell of the table under `heading`, row by row."""
    table = (ROOT / path).read_text().split(heading, 1)[1].lstrip("\n").split("\n\n", 1)[0]
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    return [[re.findall("`(.+?)`", cell) for cell in line] for line in lines[1:]]


def test_the_readme_has_a_row_for_every_architecture():
    heading = "| Architecture | `model_type` in config.json | Models |"
    listed = {name: model_types for (name,), model_types, _ in rows("README.md", heading)}
    assert listed == {
        name: [written.model_type for written in architecture.formats]
        for name, architecture in ARCHITECTURES.items()
    }


def test_the_page_on_conversion_has_a_row_for_every_model_type():
    table = rows("docs/conversion.md", "| `model_type` | Models |")
    assert {model_type for model_types, _ in table for model_type in model_types} == {
        written.model_type
        for architecture in ARCHITECTURES.values()
        for written in architecture.formats
    }
