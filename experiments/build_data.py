"""Builds the data of the experiment: python -m experiments.build_data FOLDER

Downloads Debian packages with apt (without root) and builds training, held-out and evaluation data
from them. FOLDER is replaced once everything is complete and checked. The same packages give the
same bytes.
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
from experiments.files import SUFFIX, read_lines, replacing_folder, write_datasets, write_evaluation
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
    """Builds the folder; on errors, prints one line and returns 1."""
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
    """Builds `folder` from the packages, and reports progress.

    Raises:
      FetchError: a package cannot be downloaded.
      LeakError: training data contains held-out data.
      ValueError: a package has an unexpected format.
    """
    start = time.monotonic()
    facts = read_facts(debian, say)
    say("splitting")
    split = split_facts(facts, DATASETS)
    with replacing_folder(folder) as aside:
        write_datasets(split, aside)
        write_evaluation(split, aside / "evaluation")
        say("checking that training data contains nothing held out")
        shared = check_folder(aside)
        description = describe(aside, shared, _versions(debian))
        (aside / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    for name, counts in description["lines"].items():
        say(f"{name}: {counts['train']:,} training, {counts['held_out']:,} held out")
    say(f"{folder} is complete after {time.monotonic() - start:.0f} s")


def read_facts(debian: Debian, say: Say) -> Facts:
    """Returns the facts of every source, by name, and reports their number.

    Raises:
      ValueError: a source has no facts.
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
            raise ValueError(f"the source {name} has no usable facts")
        say(f"  {len(facts[name]):,} facts")
    return facts


def python_documentation(debian: Debian) -> str:
    """Returns the name of the package with Python's documentation in this Debian release."""
    return debian.dependency("python3-doc", r"python3\.\d+-doc")


def describe(folder: Path, shared: Mapping[str, float], versions: Mapping[str, str]) -> dict:
    """Returns line counts, package versions and checksums, for `data.json`."""
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
    parser = argparse.ArgumentParser(description="Build the data of the experiment.")
    parser.add_argument("folder", type=Path, help="output folder; replaced if it exists")
    parser.add_argument(
        "--downloads", type=Path, help="folder for downloads (default: next to FOLDER)"
    )
    parser.add_argument("--mirror", help="URL of a Debian mirror (default: the machine's)")
    parser.add_argument(
        "--release", default="bookworm", help="Debian release of --mirror (default: bookworm)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
