"""Answers from held-out documents: what is asked, what counts, and the tables."""

import pytest
from small_model import small_model

from experiments import measure_model, rag
from experiments.files import read_lines
from grit_jax.rag.pipeline import RagAnswer


def test_questions_are_those_whose_answer_is_a_document(whole_data):
    questions, documents = rag.read_questions(whole_data, 3)
    assert len(questions) == 3 and len(documents) == len(set(documents))
    chats = [line["text"] for line in read_lines(whole_data / "held_out/wordnet_chat.jsonl.gz")]
    for user, answer in questions:
        assert [user, answer] in chats and answer in documents


class Fixed:
    """Answers the first question rightly from the right document, the second from another."""

    def ask(self, questions, max_new_tokens):
        assert questions == ["one?", "two?"]
        return [RagAnswer("It is uno.", [0], [1.0]), RagAnswer("Not known.", [0], [0.5])]


def test_an_answer_counts_that_has_the_definition_in_it():
    questions = [("one?", "uno"), ("two?", "due")]
    assert rag.measure(Fixed(), questions, ["uno", "due"]) == (0.5, 0.5)


@pytest.mark.slow
def test_all_ways_and_forms_have_a_line(whole_data, monkeypatch, capsys):
    model = small_model()
    monkeypatch.setattr(rag, "WAYS", ("document-prompt", "document-cache"))
    monkeypatch.setattr(rag, "NEW_TOKENS", 2)
    monkeypatch.setattr(rag, "TIMED", 1)
    monkeypatch.setattr(rag.GritLM, "from_pretrained", lambda path, dtype: model)
    assert rag.main(["model", str(whole_data), "--most", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert names[2:5] == ["without documents", "document-prompt", "document-cache"]
    assert names[7:] == ["float32", "bfloat16", "int8"]
    assert "| 0 of 2 |" in next(line for line in lines if "float32" in line)


def test_a_model_or_data_that_is_not_there_is_named_in_a_line(whole_data, tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    for command in (rag.main, measure_model.main):
        assert command([nowhere, str(whole_data)]) == 1
        assert capsys.readouterr().err.startswith(f"error: {nowhere} does not exist")
    assert rag.main([nowhere, nowhere]) == 1
    assert "experiments.build_data" in capsys.readouterr().err
