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


def paper_tables(results: Results | None) -> Iterator[Table]:
    """Yields the paper's table of embedding scores and its table of generation scores.

    Args:
      results: the scores for the last column; None leaves it empty.
    """
    yield _embedding_table({} if results is None else results.mteb)
    yield _generative_table({} if results is None else results.lm_eval)


def _embedding_table(scores: Mapping[str, float]) -> Table:
    averages, total = average_embedding_scores(scores)
    table = _table("MTEB, English")
    for row in EMBEDDING:
        score, count = averages.get(row.task_type, (None, 0))
        num_tasks = len(row.tasks)
        cell = _cell(score) + (f" ({count} tasks)" if 0 < count < num_tasks else "")
        table.add_row(f"{row.task_type} ({num_tasks})", row.metric, *_cells(row.scores), cell)
    table.add_row("average (56)", "", *_cells(EMBEDDING_AVERAGE), _cell(total))
    return table


def _generative_table(metrics: Mapping[str, Mapping[str, float]]) -> Table:
    scores = average_generative_scores(metrics)
    table = _table("Generation")
    for row in GENERATIVE:
        table.add_row(row.name, row.setting, *_cells(row.scores), _cell(scores.get(row.name)))
    # lm-eval does not include AlpacaEval, so that there is no average of the last column.
    table.add_row("average (6)", "", *_cells(GENERATIVE_AVERAGE), "")
    return table


def _table(title: str) -> Table:
    table = Table(title=title)
    for column in ("", "setting" if title == "Generation" else "metric"):
        table.add_column(column)
    for column in (*MODELS, "this model"):
        table.add_column(column, justify="right")
    return table


def _cells(scores: Sequence[float]) -> list[str]:
    return [_cell(score) for score in scores]


def _cell(score: float | None) -> str:
    return "" if score is None else f"{score:.1f}"
