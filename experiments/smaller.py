"""Held-out data of which no more than some of each kind is measured on."""

from collections.abc import Sequence
from pathlib import Path
import shutil

from experiments.files import SUFFIX, Line, folder_aside, read_lines, write_lines

# All documents of a corpus stay: how hard a search is depends on their number.
WHOLE = f"documents{SUFFIX}"


def write_smaller(data: Path, destination: Path, most: int) -> None:
    """Writes what is measured on, with at most so many lines of each file but the documents.

    Args:
      data: made by `experiments.build_data`.
      destination: a folder to make, which has the same files.
      most: lines, evenly spread over the file's.
    """
    with folder_aside(destination) as aside:
        for part in ("evaluation", "held_out"):
            for path in sorted((data / part).rglob(f"*{SUFFIX}")):
                copy = aside / path.relative_to(data)
                copy.parent.mkdir(parents=True, exist_ok=True)
                if path.name == WHOLE:
                    shutil.copyfile(path, copy)
                else:
                    write_lines(copy, _spread(read_lines(path), most))
        shutil.copytree(data / "train", aside / "train")  # A baseline learns from it.


def _spread(lines: Sequence[Line], most: int) -> list[Line]:
    count = min(most, len(lines))
    return [lines[number * len(lines) // count] for number in range(count)]
