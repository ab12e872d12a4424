"""The paper's tables, with a column for one's own model."""

from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table

from grit_jax.evaluation.paper import (
    EMBEDDING,
    EMBEDDING_AVERAGE,
    GENERATIVE,
    GENERATIVE_AVERAGE,
    MODELS,
    own_embedding_values,
    own_generative_values,
)
from grit_jax.evaluation.results import Results


def paper_tables(results: Results | None) -> Iterator[Table]:
    """Yields the paper's tables of embedding and of generation.

    Args:
      results: of one's own model; None leaves its column empty.
    """
    yield _embedding_table({} if results is None else results.mteb)
    yield _generative_table({} if results is None else results.lm_eval)


def _embedding_table(scores: Mapping[str, float]) -> Table:
    own, average = own_embedding_values(scores)
    table = _table("MTEB, English")
    for row in EMBEDDING:
        value, count = own.get(row.kind, (None, 0))
        num_tasks = len(row.tasks)
        cell = _cell(value) + (f" ({count} tasks)" if 0 < count < num_tasks else "")
        table.add_row(f"{row.kind} ({num_tasks})", row.measure, *_cells(row.values), cell)
    table.add_row("average (56)", "", *_cells(EMBEDDING_AVERAGE), _cell(average))
    return table


def _generative_table(measured: Mapping[str, Mapping[str, float]]) -> Table:
    own = own_generative_values(measured)
    table = _table("Generation")
    for row in GENERATIVE:
        table.add_row(row.name, row.setting, *_cells(row.values), _cell(own.get(row.name)))
    # AlpacaEval is measured by no harness here, so that there is no average of one's own.
    table.add_row("average (6)", "", *_cells(GENERATIVE_AVERAGE), "")
    return table


def _table(title: str) -> Table:
    table = Table(title=title)
    for column in ("", "setting" if title == "Generation" else "measure"):
        table.add_column(column)
    for column in (*MODELS, "this model"):
        table.add_column(column, justify="right")
    return table


def _cells(values: Sequence[float]) -> list[str]:
    return [_cell(value) for value in values]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
