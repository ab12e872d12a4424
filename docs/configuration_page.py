"""Writes the tables of docs/configuration.md: python docs/configuration_page.py

Names, types and defaults are those of `default_config()`. What a field is stands beside it there,
in the comment above it and the one behind it.
"""

from collections.abc import Iterator, Mapping
import inspect
from pathlib import Path
import re
import runpy
from typing import Any

from flax.traverse_util import flatten_dict

from grit_jax.config import default_config
from grit_jax.models import ARCHITECTURES

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("configuration.md")
BEGIN, END = "<!-- fields -->", "<!-- /fields -->"
CONFIGS = ("gritlm_tiny", "gritlm_7b", "gritlm_8x7b", "embedding_7b", "generative_7b")
FIELD = re.compile(r"    (config[\w.]*\.\w+) = [^#\"]*(?:\"[^\"]*\")?[^#\"]*(?:# (.*))?$")


def main() -> None:
    """Writes the page with the tables as they have to be."""
    PAGE.write_text(with_tables(PAGE.read_text()))


def with_tables(page: str) -> str:
    """Returns the page with new tables between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    tables = [*_fields(), *_sizes(), *_files()]
    return "\n".join([before + BEGIN, *tables, END + after])


def descriptions() -> dict[str, str]:
    """Returns what stands above and behind each field and section, by its full name."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(default_config).splitlines():
        if line.startswith("    # "):
            above.append(line.removeprefix("    # "))
            continue
        if field := FIELD.match(line):
            behind = [field[2]] if field[2] else []
            found[field[1]] = " ".join([*above, *behind])
        above = []
    return found


def _fields() -> Iterator[str]:
    """Yields a table for each section, in the order of `default_config`."""
    described = descriptions()
    defaults = {name: _default(name) for name in described}
    sections = {"config": ""}
    sections |= {name: described[name] for name, value in defaults.items() if _is_full(value)}
    for section, description in sections.items():
        yield from ("", f"## {section}", "", *([description, ""] if description else []))
        yield from ("| Field | Type | Default | |", "|---|---|---|---|")
        for name, value in defaults.items():
            before, _, field = name.rpartition(".")
            if before == section and name not in sections:
                anchor = f'<a id="{name}"></a>`{field}`'
                yield f"| {anchor} | {_type_and_value(value)} | {described[name]} |"


def _default(name: str) -> Any:
    """Returns the default of a field, or a section, by its full name."""
    value = default_config().to_dict()
    for key in name.split(".")[1:]:
        value = value[key]
    return value


def _is_full(value: Any) -> bool:
    """Whether it is a section; that of the sizes is empty, and treated as a field."""
    return isinstance(value, Mapping) and bool(value)


def _type_and_value(value: Any) -> str:
    return "section |" if value == {} else f"{type(value).__name__} | `{_shown(value)}`"


def _sizes() -> Iterator[str]:
    """Yields the table of sizes, which are those of the architectures."""
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
    yield from ("An empty place is the default.", "")
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
    return f'"{value}"' if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    main()
