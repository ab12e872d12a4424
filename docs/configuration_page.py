"""Writes the tables of docs/configuration.md, and grit_jax/train_help.txt with the same fields.

    python docs/configuration_page.py

The tables show the sections of `grit_jax.config.Config`: their fields, types and defaults, and the
`Attributes` in their docstrings.
"""

from collections.abc import Iterator, Mapping
import inspect
from pathlib import Path
import re
import runpy
from typing import Any

from flax.traverse_util import flatten_dict

from grit_jax.config import SECTIONS, Config, ModelSection, default_config
from grit_jax.fields import field_type, plain_fields
from grit_jax.models import ARCHITECTURES
from grit_jax.models.rotary import RopeScaling

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("configuration.md")
HELP = ROOT / "grit_jax" / "train_help.txt"
BEGIN, END = "<!-- fields -->", "<!-- /fields -->"
HELP_HEAD = """\
usage: grit-jax train --config=FILE [--workdir=DIR] [--prepare] [--config.FIELD=VALUE ...]

Trains a model, or continues the run in DIR.

  --config=FILE         the configuration: a Python file with a function get_config(), like those in
                        the folder configs
  --workdir=DIR         folder for checkpoints and metrics; runs/NAME for NAME.py by default
  --config.FIELD=VALUE  changes a field of the configuration
  --prepare             first prepares config.data.sources, if config.data.folder lacks them

The fields and their defaults, which FILE may change (docs/configuration.md describes them):
"""
CONFIGS = (
    *("gritlm_tiny", "finetune", "gritlm_7b", "gritlm_8x7b", "embedding_7b", "generative_7b"),
    *("qwen3_0_6b", "qwen3_4b", "qwen3_8b", "llama3_8b", "gemma3_1b"),
)


def main() -> None:
    """Updates the tables of the page, and the output of `grit-jax train --help`."""
    PAGE.write_text(with_tables(PAGE.read_text()))
    HELP.write_text(train_help())


def with_tables(page: str) -> str:
    """Returns the page with new tables between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = [*_fields(), *_sizes(), *_files()]
    return "\n".join([before + BEGIN, *tables, END + after])


def train_help() -> str:
    """Returns the output of `grit-jax train --help`."""
    lines = [HELP_HEAD, *_flags("config", Config)]
    for name, section in SECTIONS.items():
        lines += ["", *_flags(f"config.{name}", section)]
    return "\n".join([*lines, ""])


def _flags(name: str, section: type) -> Iterator[str]:
    """Yields a line with each field of a section and its default, as they are typed."""
    defaults = section()
    for field, annotation in plain_fields(section).items():
        if field_type(annotation) is not dict:
            yield f"  --{name}.{field}={getattr(defaults, field)}"
        else:
            for size, value in ARCHITECTURES[ModelSection.architecture].sizes.items():
                yield f"  --{name}.{field}.{size}={value}"


def descriptions() -> dict[str, str]:
    """Returns the description of each field, by its full name."""
    sections = {"config": Config}
    sections |= {f"config.{name}": section for name, section in SECTIONS.items()}
    return {
        f"{name}.{field}": attributes[field]
        for name, section in sections.items()
        for attributes in [_attributes(section)]
        for field in plain_fields(section)
        if field in attributes
    }


def _attributes(section: type) -> dict[str, str]:
    """Returns the `Attributes` in the docstrings of a dataclass and its bases."""
    found: dict[str, str] = {}
    for base in reversed(section.__mro__[:-1]):
        _, _, rest = (inspect.getdoc(base) or "").partition("\nAttributes:\n")
        attributes = rest.partition("\n\n")[0]
        for name, text in re.findall(r"^  (\w+): (.*(?:\n    .*)*)", attributes, re.MULTILINE):
            text = " ".join(text.split())
            found[name] = text[0].upper() + text[1:]
    return found


def _fields() -> Iterator[str]:
    """Yields a table for each section."""
    yield from _section("config", Config, "")
    for name, section in SECTIONS.items():
        yield from _section(f"config.{name}", section, _summary(section))


def _summary(section: type) -> str:
    """Returns the paragraphs of a docstring before its first list."""
    paragraphs = re.split(r"\n\n(?=\w+:\n)", inspect.getdoc(section) or "")[0]
    return "\n".join(" ".join(part.split()) for part in re.split(r"\n(?=\n)", paragraphs))


def _section(name: str, section: type, summary: str) -> Iterator[str]:
    defaults, described = section(), descriptions()
    yield from ("", f"## {name}", "", *([summary, ""] if summary else []))
    yield from ("| Field | Type | Default | |", "|---|---|---|---|")
    for field, annotation in plain_fields(section).items():
        anchor = f'<a id="{name}.{field}"></a>`{field}`'
        kind = field_type(annotation)
        default = "" if kind is dict else f" `{_shown(getattr(defaults, field))}`"
        kind_name = "section" if kind is dict else kind.__name__
        yield f"| {anchor} | {kind_name} |{default} | {described[f'{name}.{field}']} |"


def _sizes() -> Iterator[str]:
    """Yields the table of the architectures' sizes."""
    defaults = {name: architecture.sizes for name, architecture in ARCHITECTURES.items()}
    yield from ("", "## config.model.sizes", "")
    yield from ("The defaults are those of Mistral 7B and Mixtral 8x7B.", "")
    yield from (f"| Field | {' | '.join(defaults)} |", f"|---|{'---|' * len(defaults)}")
    for field in dict.fromkeys(field for sizes in defaults.values() for field in sizes):
        values = (f"`{_shown(of[field])}`" if field in of else "" for of in defaults.values())
        yield f"| `{field}` | {' | '.join(values)} |"


def _files() -> Iterator[str]:
    """Yields the table of what the files in `configs/` set."""
    defaults = flatten_dict(default_config().to_dict(), sep=".")
    files = {name: _changes(name, defaults) for name in CONFIGS}
    yield from ("", "## What the files set", "")
    yield from ("An empty cell means the default.", "")
    yield from (f"| Field | {' | '.join(files)} |", f"|---|{'---|' * len(files)}")
    fields = dict.fromkeys(field for changes in files.values() for field in changes)
    for field in fields:
        values = (f"`{_shown(of[field])}`" if field in of else "" for of in files.values())
        yield f"| `{field}` | {' | '.join(values)} |"


def _changes(name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    fields = flatten_dict(config.to_dict(), sep=".")
    return {field: value for field, value in fields.items() if value != defaults.get(field)}


def _shown(value: Any) -> str:
    if isinstance(value, RopeScaling):
        value = value.to_fields()
    return f'"{value}"' if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    main()
