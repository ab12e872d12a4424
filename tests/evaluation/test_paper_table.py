"""The paper's tables with the scores of another model."""

from concurrent.futures import ThreadPoolExecutor
import json
import sys

import pytest
from rich.console import Console

from grit_jax import cli
from grit_jax.evaluation import command as evaluate_command
from grit_jax.evaluation.paper import (
    EMBEDDING,
    EMBEDDING_AVERAGE,
    GENERATIVE,
    GENERATIVE_AVERAGE,
    MODELS,
)
from grit_jax.evaluation.paper_table import paper_tables
from grit_jax.evaluation.results import Results, ResultsError

TASK_TYPES = {task: row.task_type for row in EMBEDDING for task in row.tasks}


def shown(results, **options):
    console = Console(width=140, record=True)
    for table in paper_tables(results, **options):
        console.print(table)
    lines = [line.split("│") for line in console.export_text().splitlines() if "│" in line]
    return {line[1].strip(): line[-2].strip() for line in lines}


def test_the_papers_numbers_have_the_papers_averages():
    for number in range(len(MODELS)):
        total = sum(row.scores[number] * len(row.tasks) for row in EMBEDDING)
        assert total / 56 == pytest.approx(EMBEDDING_AVERAGE[number], abs=0.06)
        total = sum(row.scores[number] for row in GENERATIVE)
        assert total / 6 == pytest.approx(GENERATIVE_AVERAGE[number], abs=0.06)


def test_the_own_column_is_empty_without_results():
    assert set(shown(None).values()) == {""}
    assert len(shown(None)) == len(EMBEDDING) + 1 + len(GENERATIVE) + 1


def test_the_own_column_has_means_of_what_is_there(tmp_path):
    results = Results(tmp_path / "results", "a model")
    results.add("mteb", {"STS12": 0.5, "STS13": 0.7, "SummEval": 0.3, "of_my_own": 1.0})
    results.add("lm_eval", {"mmlu": {"acc,none": 0.25}, "tydiqa_goldp_en": {"f1,none": 0.5}})
    own = shown(Results(tmp_path / "results"))
    assert own["STS (10)"] == "60.0 (2 tasks)" and own["Summarization (1)"] == "30.0"
    assert own["average (56)"] == "" and own["Retrieval (15)"] == ""
    assert own["MMLU"] == "25.0" and own["TyDi QA"] == ""  # One language of nine.
    scored = shown(results, only_scored=True)
    assert scored.keys() == {"STS (10)", "Summarization (1)", "MMLU"}
    results.add("mteb", {task: 0.5 if TASK_TYPES[task] == "STS" else 0.25 for task in TASK_TYPES})
    expected = 100 * (10 * 0.5 + 46 * 0.25) / 56
    assert shown(results)["average (56)"] == f"{expected:.1f}"


def test_results_are_those_of_one_model_and_whole(tmp_path):
    Results(tmp_path, "one").add("mteb", {"STS12": 0.5})
    Results(tmp_path, "one").add("lm_eval", {"mmlu": {"acc,none": 0.25}})
    content = json.loads((tmp_path / "scores.json").read_text())
    assert content == {
        "model": "one",
        "settings": {},
        "mteb": {"STS12": 0.5},
        "lm_eval": {"mmlu": {"acc,none": 0.25}},
    }
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "scores.json"}
    with pytest.raises(ResultsError, match=r"results of another model \(one; this is two\)"):
        Results(tmp_path, "two")
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(ResultsError, match=r"not JSON: delete it"):
        Results(tmp_path, "one")


def test_two_evaluations_at_once_keep_each_others_scores(tmp_path):
    embedding, generation = Results(tmp_path, "one"), Results(tmp_path, "one")
    embedding.add("mteb", {"STS12": 0.5})
    generation.add("lm_eval", {"mmlu": {"acc,none": 0.25}})
    embedding.add("mteb", {"STS13": 0.5})
    found = Results(tmp_path)
    assert found.mteb == {"STS12": 0.5, "STS13": 0.5} and found.lm_eval.keys() == {"mmlu"}


def test_scores_that_are_added_in_one_moment_all_stay(tmp_path):
    def add(harness):
        results = Results(tmp_path, "one")
        scores = {"acc": 0.5} if harness == "lm_eval" else 0.5
        for number in range(50):
            results.add(harness, {f"task {number}": scores})

    with ThreadPoolExecutor() as pool:
        list(pool.map(add, ("mteb", "lm_eval")))
    found = Results(tmp_path)
    assert len(found.mteb) == len(found.lm_eval) == 50


def test_scores_of_one_harness_are_measured_in_one_way(tmp_path):
    results = Results(tmp_path, "one")
    results.begin("mteb", {"dtype": "float32", "pooling": "cls"})
    results.add("mteb", {"STS12": 0.5})
    again = Results(tmp_path, "one")
    again.begin("mteb", {"dtype": "float32", "pooling": "cls"})
    again.begin("lm_eval", {"dtype": "bfloat16"})
    with pytest.raises(ResultsError, match=r"pooling was 'cls' and is 'mean'. Choose another"):
        again.begin("mteb", {"dtype": "float32", "pooling": "mean"})
    with pytest.raises(FileExistsError):  # Before anything is measured.
        Results(tmp_path / "scores.json", "one").begin("mteb", {})


def test_a_part_of_a_task_is_no_number_of_the_table(tmp_path):
    results = Results(tmp_path, "one")
    results.add("lm_eval", {"mmlu (limit 10)": {"acc,none": 0.25}})
    assert shown(results, only_scored=True) == {}
    assert shown(results)["MMLU"] == ""


def test_the_table_needs_no_harness(monkeypatch, capsys):
    for name in ("mteb", "lm_eval"):
        monkeypatch.setitem(sys.modules, name, None)  # As if it were not installed.
    evaluate_command.run(["table"])
    assert "66.8" in capsys.readouterr().out


def test_what_the_system_refuses_is_said_in_a_line(tmp_path, capsys):
    (tmp_path / "scores.json").mkdir()
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "table", "--output", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert "IsADirectoryError" in line and "scores.json" in line
