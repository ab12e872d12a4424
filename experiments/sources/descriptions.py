"""Debian packages: the short description, and the long one without the package name."""

from collections.abc import Iterator
from pathlib import Path
import re

from experiments.facts import Fact, normalize_words
from tools.sample.jargon import mask, shorten
from tools.sample.text import clean, count_words, is_welcome, pick, stable_number

SHORT_WORDS = range(2, 16)
LONG_WORDS = range(8, 81)
NAME_QUESTIONS = (
    "What is the Debian package {name}?",
    "Describe the software package {name}.",
    "What do I get when I install {name}?",
    "Tell me about the package {name}.",
)
SUMMARY_TASKS = (
    "Summarise this description of a software package in one line: {text}",
    "Write a short description of the package that is described here: {text}",
    "What is this software, in a few words? {text}",
)
# Suffixes of packages that contain only a part of a program.
_PART = re.compile(
    r"-(dev|doc|docs|dbg|dbgsym|common|data|examples|tests?|utils|tools|bin|l10n[\w-]*|i18n|headers)$"
)


def read_descriptions(translation: Path, packages: Path) -> list[Fact]:
    """Returns a fact for each source package with a unique description.

    Args:
      translation: apt's list of English descriptions, `..._Translation-en`.
      packages: apt's list of packages, `..._Packages`, which names the source packages.
    """
    sources = {name: _source(stanza) for name, stanza in _stanzas(packages)}
    chosen: dict[str, tuple[str, str]] = {}
    for name, stanza in _stanzas(translation):
        source = sources.get(name, name)
        if source not in chosen or _sort_key(name, source) < _sort_key(chosen[source][0], source):
            chosen[source] = name, stanza
    distinct: dict[str, Fact] = {}
    for source, (name, stanza) in sorted(chosen.items()):
        fact = _fact(name, source, stanza)
        if fact is not None:
            # Ignore differences in version numbers.
            distinct.setdefault(_without_digits(normalize_words(fact.passage)), fact)
    return list(distinct.values())


def _stanzas(path: Path) -> Iterator[tuple[str, str]]:
    """Yields the name and the stanza of each package."""
    stanzas = path.read_text(encoding="utf-8").split("\n\n")
    for stanza in filter(str.strip, stanzas):
        name = re.match(r"\n*Package: (\S+)", stanza)
        if name is None:
            raise ValueError(f"not a package list: {path}: {stanza[:60]!r}")
        yield name[1], stanza


def _source(stanza: str) -> str:
    """Returns the name of the source package; the default is the package name."""
    field = re.search(r"^Source: (\S+)", stanza, re.M) or re.search(
        r"^Package: (\S+)", stanza, re.M
    )
    return field[1] if field else ""


def _sort_key(name: str, source: str) -> tuple[bool, bool, int, str]:
    """Returns the sort key that puts the package most typical of its source first."""
    return name != source, _PART.search(name) is not None, len(name), name


def _fact(name: str, source: str, stanza: str) -> Fact | None:
    """Returns None if the description is too short or too long."""
    _, _, description = stanza.partition("Description-en: ")
    first_line, _, rest = description.partition("\n")
    short, long = clean(first_line), shorten(_running_text(rest), LONG_WORDS)
    masked = mask(mask(long, name), source)
    told = masked.replace("____", "")
    if count_words(told) < LONG_WORDS.start or count_words(short) not in SHORT_WORDS:
        return None
    if not is_welcome(short, long):
        return None
    asks_for_name = stable_number("chat " + source) % 2 == 0
    task = pick(NAME_QUESTIONS if asks_for_name else SUMMARY_TASKS, source)
    return Fact(
        keys=(
            # Versions of a package, such as gcc-11 and gcc-12, share a key.
            f"package {_without_digits(source)}",
            f"short {_without_digits(normalize_words(short))}",
        ),
        user=task.format(name=name, text=long),
        assistant=long if asks_for_name else short,
        query=short,
        passage=masked,
        unmasked=long,
        kind="name" if asks_for_name else "summary",
    )


def _without_digits(text: str) -> str:
    return re.sub(r"[0-9.]+", "", text)


def _running_text(rest: str) -> str:
    """Returns the paragraphs as one line, without lists and code, which are indented further."""
    lines = []
    for line in rest.split("\n"):
        if not line.startswith(" "):
            break  # The next field.
        if re.match(r" [^\s.]", line):
            lines.append(line)
    return clean(" ".join(lines))
