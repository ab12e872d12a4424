"""Makes the data of the experiment: python -m experiments.build_data FOLDER

Fetches Debian packages with apt (no root rights are needed) and makes from them training data,
held-out data and what is measured on; FOLDER is replaced when all of it is whole and checked.
The same packages give the same bytes.
"""

import argparse
from collections.abc import Callable, Mapping
import hashlib
import json
from pathlib import Path
import sys
import time

from rich.console import Console

from experiments.check import LeakError, check_folder
from experiments.datasets import DATASETS
from experiments.facts import Fact
from experiments.files import SUFFIX, folder_aside, read_lines, write_datasets, write_evaluation
from experiments.sources.debian import Debian, FetchError, Mirror
from experiments.sources.descriptions import read_descriptions
from experiments.sources.dictionaries import read_foldoc_entries, read_jargon_entries
from experiments.sources.faq import read_faqs
from experiments.sources.reasoning import MissingPackageError, make_reasoning_items
from experiments.sources.wordnet import read_senses
from experiments.split import Facts, split_facts
from tools.sample.build import JARGON_IN_PACKAGE, WORDNET_IN_PACKAGE

FOLDOC_IN_PACKAGE = Path("usr/share/dictd/foldoc.dict.dz")
PERL_FAQ = "usr/share/perl/*/pod"
PYTHON_FAQ = "usr/share/doc/python3.*[0-9]/html/_sources/faq"
DESCRIPTION = "data.json"

Say = Callable[[str], None]


def main(arguments: list[str] | None = None) -> int:
    """Makes the folder; returns 1, with one line that says why, if it cannot be made."""
    options = _parse_arguments(arguments)
    console = Console(highlight=False)
    mirror = Mirror(options.mirror, options.release) if options.mirror else None
    debian = Debian(options.downloads or options.folder.with_name("downloads"), mirror)
    try:
        build(debian, options.folder, console.print)
    except (FetchError, LeakError, MissingPackageError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def build(debian: Debian, folder: Path, say: Say) -> None:
    """Makes `folder` from the packages, and says what is being done.

    Raises:
      FetchError: a package cannot be fetched.
      LeakError: something held out would be trained on.
      ValueError: a package does not have the form that it should.
    """
    start = time.monotonic()
    facts = read_facts(debian, say)
    say("splitting")
    split = split_facts(facts, DATASETS)
    with folder_aside(folder) as aside:
        write_datasets(split, aside)
        write_evaluation(split, aside / "evaluation")
        say("checking that nothing held out is trained on")
        shared = check_folder(aside)
        description = describe(aside, shared, _versions(debian))
        (aside / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    for name, counts in description["lines"].items():
        say(f"{name}: {counts['train']:,} to train on, {counts['held_out']:,} held out")
    say(f"{folder} is whole, after {time.monotonic() - start:.0f} s")


def read_facts(debian: Debian, say: Say) -> Facts:
    """Returns the facts of every source by its name, and says how many there are.

    Raises:
      ValueError: a source has none.
    """
    readers = {
        "wordnet": lambda: read_senses(debian.package("wordnet-base") / WORDNET_IN_PACKAGE),
        "foldoc": lambda: read_foldoc_entries(debian.package("dict-foldoc") / FOLDOC_IN_PACKAGE),
        "jargon": lambda: read_jargon_entries(debian.package("dict-jargon") / JARGON_IN_PACKAGE),
        "debian": lambda: read_descriptions(
            debian.list_file("Translation-en"), debian.list_file("Packages")
        ),
        "faq": lambda: read_faqs(
            _only_folder(debian.package("perl-doc"), PERL_FAQ),
            _only_folder(debian.package(python_documentation(debian)), PYTHON_FAQ),
        ),
        "reasoning": make_reasoning_items,
    }
    facts: dict[str, list[Fact]] = {}
    for name, read in readers.items():
        say(f"reading {name}")
        facts[name] = read()
        if not facts[name]:
            raise ValueError(f"found nothing to use in the source {name}")
        say(f"  {len(facts[name]):,} facts")
    return facts


def python_documentation(debian: Debian) -> str:
    """Returns the package that has Python's documentation in this release of Debian."""
    return debian.dependency("python3-doc", r"python3\.\d+-doc")


def describe(folder: Path, shared: Mapping[str, float], versions: Mapping[str, str]) -> dict:
    """Returns what the folder holds and was made from, for a file beside it."""
    files = sorted(folder.rglob(f"*{SUFFIX}"))
    names = {path.name.removesuffix(SUFFIX) for path in (folder / "train").iterdir()}
    return {
        "versions": dict(versions),
        "lines": {
            name: {
                side: len(read_lines(folder / side / f"{name}{SUFFIX}"))
                for side in ("train", "held_out")
            }
            for name in sorted(names)
        },
        "share_with_eight_words_in_a_row_in_training": dict(shared),
        "sha256": {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        },
    }


def _versions(debian: Debian) -> dict[str, str]:
    packages = ["wordnet-base", "dict-foldoc", "dict-jargon", "perl-doc"]
    packages.append(python_documentation(debian))
    found = {name: debian.version(name) for name in packages}
    for kind in ("Translation-en", "Packages"):
        found[kind] = hashlib.sha256(debian.list_file(kind).read_bytes()).hexdigest()
    return found


def _only_folder(package: Path, pattern: str) -> Path:
    found = list(package.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"expected one folder {pattern} in {package}, found {len(found)}")
    return found[0]


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the data of the experiment.")
    parser.add_argument("folder", type=Path, help="where to put it; what is there is replaced")
    parser.add_argument("--downloads", type=Path, help="what is fetched (default: beside FOLDER)")
    parser.add_argument("--mirror", help="address of a Debian mirror (default: the machine's)")
    parser.add_argument("--release", default="bookworm", help="of --mirror (default: bookworm)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
