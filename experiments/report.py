"""Tables and a figure of the experiment's measures, from the files of its runs."""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
import numpy as np
from rich.console import Console

from experiments.measure import TITLES, Measures, shown
from experiments.presets import ABLATIONS, MAIN, UNTRAINED

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Measures of the embedding and the generative half of a model.
EMBEDDING = (
    "wordnet_senses/ndcg_at_10",
    "wordnet_senses/hard_negatives",
    "foldoc_entries/ndcg_at_10",
    "jargon_entries/ndcg_at_10",
    "debian_descriptions/ndcg_at_10",
    "faq_answers/ndcg_at_10",
)
GENERATION = (
    "wordnet_choices/accuracy_per_character",
    "reasoning/exact_match",
    "all_chats/bits_per_byte",
)
RANKED = tuple(measure for measure in EMBEDDING if measure.endswith("ndcg_at_10"))
LOWER_IS_BETTER = ("perplexity", "bits_per_byte")

# Maps run and measure to the values of all seeds.
Columns = dict[str, dict[str, list[float]]]


def write_report(folder: Path, about: Mapping[str, Any], console: Console) -> None:
    """Writes `report.md` and `claim.svg`, and prints the report."""
    runs = [json.loads(path.read_text()) for path in (folder / "runs").glob("*/measures.json")]
    columns = read_columns(json.loads((folder / "baselines.json").read_text()), runs)
    devices = "; ".join(sorted({run["device"] for run in runs}))
    text = report(columns, {**about, "device": devices})
    (folder / "report.md").write_text(text)
    draw(columns, folder / "claim.svg")
    console.print(text, markup=False, soft_wrap=True)


def read_columns(baselines: Mapping[str, Measures], found: Sequence[Mapping[str, Any]]) -> Columns:
    """Returns the measures of baselines and runs, by name."""
    columns: Columns = {}
    for name, measures in baselines.items():
        columns[name] = {measure: [value] for measure, value in measures.items()}
    for run in (UNTRAINED, *MAIN, *ABLATIONS):
        of_seeds = sorted((one for one in found if one["run"] == run.name), key=lambda x: x["seed"])
        if of_seeds:
            names = of_seeds[0]["measures"]
            values = {name: [one["measures"][name] for one in of_seeds] for name in names}
            columns[run.name] = values
    return columns


def report(columns: Columns, about: Mapping[str, Any]) -> str:
    """Returns all tables as Markdown."""
    others = [name for name in columns if name not in {run.name for run in ABLATIONS}]
    lines = [f"- {name}: {value}" for name, value in about.items()]
    lines += ["", "### Embedding", "", *table(columns, others, EMBEDDING)]
    runs = [name for name in others if "all_chats/bits_per_byte" in columns[name]]
    constant = [name for name in others if name == "constant"]
    lines += ["", "### Generation", "", *table(columns, [*constant, *runs], GENERATION)]
    lines += ["", "### The claim", "", *verdict(columns)]
    ablated = [run.name for run in ABLATIONS if run.name in columns]
    if ablated:
        chosen = [name for name in ("unified", *ablated) if name in columns]
        lines += ["", "### Ablations", "", *table(columns, chosen, (*EMBEDDING, *GENERATION))]
    every = list(dict.fromkeys(name for one in columns.values() for name in one))
    lines += ["", "### All measures", "", *table(columns, list(columns), every)]
    return "\n".join(lines) + "\n"


def table(columns: Columns, names: Sequence[str], measures: Sequence[str]) -> list[str]:
    """Returns the lines of a table with mean and standard deviation over seeds."""
    lines = [f"| dataset | measure | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for measure in measures:
        dataset, kind = measure.split("/")
        cells = [_cell(columns[name].get(measure, [])) for name in names]
        lines.append(f"| {dataset} | {TITLES[kind]} | {' | '.join(cells)} |")
    return lines


def verdict(columns: Columns) -> list[str]:
    """Returns the lines of a table that compares unified with the specialists.

    A difference is "within" noise if it is below two standard errors of the difference of means;
    one seed gives no verdict.
    """
    lines = ["| dataset | measure | specialist | unified | difference | two standard errors | |"]
    lines.append("|---|---|---|---|---|---|---|")
    for specialist, measures in (("embedding only", EMBEDDING), ("generation only", GENERATION)):
        for measure in measures if {specialist, "unified"} <= columns.keys() else ():
            dataset, kind = measure.split("/")
            own, both = (columns[name][measure] for name in (specialist, "unified"))
            difference = np.mean(both) - np.mean(own)
            sign = -1 if kind in LOWER_IS_BETTER else 1
            shown = [_cell(own), _cell(both), f"{difference:+.3f}"]
            if min(len(own), len(both)) < 2:
                lines.append(f"| {dataset} | {TITLES[kind]} | {' | '.join(shown)} | | one seed |")
                continue
            noise = 2 * np.sqrt(np.var(own, ddof=1) / len(own) + np.var(both, ddof=1) / len(both))
            word = "worse" if sign * difference < -noise else "within"
            word = "better" if sign * difference > noise else word
            lines.append(
                f"| {dataset} | {TITLES[kind]} | {' | '.join(shown)} | {noise:.3f} | {word} |"
            )
    return lines


def draw(columns: Columns, path: Path) -> None:
    """Plots retrieval against generation, one point per seed, and nDCG@10 of each corpus."""
    figure, (joint, corpora) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 3))
    runs = [run.name for run in (UNTRAINED, *MAIN) if run.name in columns]
    baselines = [name for name in ("BM25", "MiniLM") if name in columns]
    colors = {name: f"C{number}" for number, name in enumerate([*runs, *baselines])}
    for name in runs:
        mean = np.mean([columns[name][measure] for measure in RANKED], axis=0)
        joint.scatter(mean, columns[name]["all_chats/bits_per_byte"], color=colors[name])
    joint.set_xlabel("mean nDCG@10 of five corpora")
    joint.set_ylabel("bits per byte of held-out chats (lower is better)")
    joint.invert_yaxis()
    joint.locator_params(axis="x", nbins=5)
    _draw_corpora(corpora, columns, colors)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _draw_corpora(axes: Axes, columns: Columns, colors: Mapping[str, Any]) -> None:
    """Plots the mean over seeds for each corpus, with error bars from minimum to maximum."""
    width = 0.8 / len(colors)
    positions = np.arange(len(RANKED))
    for number, (name, color) in enumerate(colors.items()):
        values = [columns[name][measure] for measure in RANKED]
        means, lowest, highest = (np.array(list(map(f, values))) for f in (np.mean, min, max))
        ends = [means - lowest, highest - means]
        axes.bar(positions + number * width, means, width, yerr=ends, color=color, label=name)
    titles = [measure.split("/")[0].replace("_", "\n") for measure in RANKED]
    axes.set_xticks(positions + 0.4 - width / 2, titles)
    axes.set_ylabel("nDCG@10")
    axes.legend()


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {shown(float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
    return f"{shown(float(np.mean(values)))}{spread}"
