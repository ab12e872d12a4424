"""A table of held-out metrics before and after training, next to chance and BM25."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from grit_jax.evaluation.held_out import HeldOut

METRIC_TITLES = {"ndcg_at_10": "nDCG@10", "recall_at_1": "recall@1"}


def held_out_table(held_out: HeldOut, lines: list[dict[str, Any]]) -> Table:
    """Returns a table of the first and last held-out metrics of a run.

    Args:
      held_out: the held-out data, for the baselines.
      lines: the lines of the run's metrics.jsonl; at least one has held-out metrics.
    """
    evaluated = [line for line in lines if any(name.startswith("held_out/") for name in line)]
    try:
        bm25: Mapping[str, float] = held_out.bm25_baseline()
    except (ImportError, FileNotFoundError):  # It needs the extras `eval` and `data`.
        bm25 = {}
    chance = held_out.chance()
    first, last = evaluated[0], evaluated[-1]
    table = Table(title="held-out data")
    for column in ("metric", "chance", "BM25", f"step {first['step']}", f"step {last['step']}"):
        table.add_column(column, justify="left" if column == "metric" else "right")

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:,.1f}"

    for name in (name for name in last if name.startswith("held_out/")):
        metric = name.removeprefix("held_out/")
        *dataset, kind = metric.split("/")
        table.add_row(
            "  ".join([*dataset, METRIC_TITLES.get(kind, kind)]),
            cell(chance.get(metric)),
            cell(bm25.get(metric)),
            cell(first.get(name)),
            cell(last[name]),
        )
    return table
