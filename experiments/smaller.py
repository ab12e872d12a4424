"""Limits the held-out data used for evaluation."""

from collections.abc import Sequence
from pathlib import Path
import shutil

from experiments.files import SUFFIX, Line, read_lines, replacing_folder, write_lines

# All documents of a corpus are kept, because their number makes retrieval hard.
WHOLE = f"documents{SUFFIX}"


def write_smaller(data: Path, destination: Path, most: int) -> None:
    """Copies the evaluation data with at most `most` lines per file, except for documents.

    Args:
      data: output of `experiments.build_data`.
      destination: folder to write, with the same files.
      most: maximum lines per file, evenly spaced.
    """
    with replacing_folder(destination) as aside:
        for part in ("evaluation", "held_out"):
            for path in sorted((data / part).rglob(f"*{SUFFIX}")):
                copy = aside / path.relative_to(data)
                copy.parent.mkdir(parents=True, exist_ok=True)
                if path.name == WHOLE:
                    shutil.copyfile(path, copy)
                else:
                    write_lines(copy, _spread(read_lines(path), most))
        shutil.copytree(data / "train", aside / "train")  # For the baseline "constant".


def _spread(lines: Sequence[Line], most: int) -> list[Line]:
    count = min(most, len(lines))
    return [lines[number * len(lines) // count] for number in range(count)]
