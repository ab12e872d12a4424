"""Held-out measures before and after training, beside chance and BM25, for people to read."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from grit_jax.evaluation.held_out import HeldOut

MEASURE_TITLES = {"ndcg_at_10": "nDCG@10", "recall_at_1": "recall@1"}


def result_table(held_out: HeldOut, lines: list[dict[str, Any]]) -> Table:
    """Returns the measures of the first and the last of a run's lines that have any."""
    measured = [line for line in lines if any(name.startswith("held_out/") for name in line)]
    try:
        bm25: Mapping[str, float] = held_out.bm25_baseline()
    except (ImportError, FileNotFoundError):  # The extras "eval" and "data" bring what it needs.
        bm25 = {}
    chance = held_out.chance()
    first, last = measured[0], measured[-1]
    table = Table(title="held-out data")
    for column in ("measure", "chance", "BM25", f"step {first['step']}", f"step {last['step']}"):
        table.add_column(column, justify="left" if column == "measure" else "right")

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}" if value < 10 else f"{value:,.1f}"

    for name in (name for name in last if name.startswith("held_out/")):
        measure = name.removeprefix("held_out/")
        *dataset, kind = measure.split("/")
        table.add_row(
            "  ".join([*dataset, MEASURE_TITLES.get(kind, kind)]),
            cell(chance.get(measure)),
            cell(bm25.get(measure)),
            cell(first.get(name)),
            cell(last[name]),
        )
    return table
