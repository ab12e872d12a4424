"""The paper's tables of scores, with a column for another model."""

from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table

from grit_jax.evaluation.paper import (
    EMBEDDING,
    EMBEDDING_AVERAGE,
    GENERATIVE,
    GENERATIVE_AVERAGE,
    MODELS,
    average_embedding_scores,
    average_generative_scores,
)
from grit_jax.evaluation.results import Results


def paper_tables(results: Results | None, *, only_scored: bool = False) -> Iterator[Table]:
    """Yields the paper's table of embedding scores and its table of generation scores.

    Args:
      results: the scores for the last column; None leaves it empty.
      only_scored: whether to omit rows, and tables, that have no score in the last column.
    """
    columns = {
        "MTEB, English": _embedding_rows({} if results is None else results.mteb),
        "Generation": _generative_rows({} if results is None else results.lm_eval),
    }
    for title, all_rows in columns.items():
        rows = [row for row in all_rows if row[-1] or not only_scored]
        if rows:
            yield _table(title, rows)


def _embedding_rows(scores: Mapping[str, float]) -> Iterator[list[str]]:
    averages, total = average_embedding_scores(scores)
    for row in EMBEDDING:
        score, count = averages.get(row.task_type, (None, 0))
        num_tasks = len(row.tasks)
        cell = _cell(score) + (f" ({count} tasks)" if 0 < count < num_tasks else "")
        yield [f"{row.task_type} ({num_tasks})", row.metric, *_cells(row.scores), cell]
    yield ["average (56)", "", *_cells(EMBEDDING_AVERAGE), _cell(total)]


def _generative_rows(metrics: Mapping[str, Mapping[str, float]]) -> Iterator[list[str]]:
    scores = average_generative_scores(metrics)
    for row in GENERATIVE:
        yield [row.name, row.setting, *_cells(row.scores), _cell(scores.get(row.name))]
    # lm-eval does not include AlpacaEval, so that there is no average of the last column.
    yield ["average (6)", "", *_cells(GENERATIVE_AVERAGE), ""]


def _table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for column in ("", "setting" if title == "Generation" else "metric"):
        table.add_column(column)
    for column in (*MODELS, "this model"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _cells(scores: Sequence[float]) -> list[str]:
    return [_cell(score) for score in scores]


def _cell(score: float | None) -> str:
    return "" if score is None else f"{score:.1f}"
