"""Answers from held-out documents: questions, matches and tables."""

import pytest
from small_model import small_model

from experiments import measure_model, rag
from experiments.files import read_lines
from grit_jax.rag.pipeline import RagAnswer, Source


def test_answers_of_questions_are_documents(whole_data):
    questions, documents = rag.read_questions(whole_data, 3)
    assert len(questions) == 3 and len(documents) == len(set(documents))
    chats = [line["text"] for line in read_lines(whole_data / "held_out/wordnet_chat.jsonl.gz")]
    for user, answer in questions:
        assert [user, answer] in chats and answer in documents


class Fixed:
    """Answers the first question from the right document, the second from a wrong one."""

    def ask(self, questions, max_new_tokens):
        assert questions == ["one?", "two?"]
        source = Source({"text": "uno"}, 1.0)
        return [RagAnswer("It is uno.", [source]), RagAnswer("Not known.", [source])]


def test_an_answer_matches_if_it_contains_the_definition():
    questions = [("one?", "uno"), ("two?", "due")]
    assert rag.measure(Fixed(), questions) == (0.5, 0.5)


@pytest.mark.slow
def test_all_modes_and_formats_have_a_row(whole_data, monkeypatch, capsys):
    model = small_model()
    monkeypatch.setattr(rag, "CACHE_MODES", ("document-prompt", "document-cache"))
    monkeypatch.setattr(rag, "NEW_TOKENS", 2)
    monkeypatch.setattr(rag, "TIMED", 1)
    monkeypatch.setattr(rag.GritLM, "from_pretrained", lambda path, dtype: model)
    assert rag.main(["model", str(whole_data), "--most", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert names[2:5] == ["without documents", "document-prompt", "document-cache"]
    assert names[7:] == ["float32", "bfloat16", "int8"]
    assert "| 0 of 2 |" in next(line for line in lines if "float32" in line)


def test_missing_models_and_data_are_one_line_errors(whole_data, tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    for command in (rag.main, measure_model.main):
        assert command([nowhere, str(whole_data)]) == 1
        assert capsys.readouterr().err.startswith(f"error: {nowhere} does not exist")
    assert rag.main([nowhere, nowhere]) == 1
    assert "experiments.build_data" in capsys.readouterr().err
