"""Answers from held-out documents, by each way of caching: python -m experiments.rag MODEL DATA

The documents are the definitions of words that were not trained on; the questions ask what such a
word means in a sentence. An answer matches if it has the definition in it. Written beside: how
often the right document was found, and how long an answer takes, the search included; and, by the
form that caches are stored in, how many answers are other ones than with float32.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
import statistics
import sys
import tempfile
import time

from experiments.files import SUFFIX, read_lines
from grit_jax import GritLM
from grit_jax.conversion import ConversionError
from grit_jax.rag.cache_store import FORMATS
from grit_jax.rag.index import DocumentIndex, build_index
from grit_jax.rag.pipeline import CACHE_MODES, RagPipeline
from grit_jax.text.templates import chat_prompt

NEW_TOKENS = 32
EXACT = "float32"  # The form of stored caches that the others are held against.
# Questions that are timed, one at a time, after one that is not.
TIMED = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints both tables in Markdown; returns 1, with a line, if there is no model or no data."""
    parser = argparse.ArgumentParser(description="Answer held-out questions by each way of RAG.")
    parser.add_argument("model", type=Path, help="a run's folder, or any other model")
    parser.add_argument("data", type=Path, help="made by experiments.build_data")
    parser.add_argument("--most", type=int, default=100, help="questions (100)")
    options = parser.parse_args(arguments)
    try:
        questions, documents = read_questions(options.data, options.most)
        model = GritLM.from_pretrained(options.model, dtype="float32")
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        indexes = {}
        for form in FORMATS:
            build_index(
                model, [{"text": text} for text in documents], f"{folder}/{form}", caches=form
            )
            indexes[form] = DocumentIndex(f"{folder}/{form}", model)
        print("\n".join(ways_table(model, questions, documents, indexes[EXACT])))
        print("\n".join(["", *forms_table(model, questions, indexes)]))
    return 0


def ways_table(
    model: GritLM,
    questions: Sequence[tuple[str, str]],
    documents: Sequence[str],
    index: DocumentIndex,
) -> list[str]:
    """Returns the lines of a table of all ways, in Markdown."""
    lines = ["| way | match | right document | seconds an answer |", "|---|---|---|---|"]
    match = answered_alone(model, questions)
    lines.append(f"| without documents | {match:.3f} | | |")
    for way in CACHE_MODES:
        answerer = RagPipeline(model, index, way, answer_prefix="")
        match, found = measure(answerer, questions, documents)
        seconds = time_of_an_answer(answerer, [question for question, _ in questions])
        lines.append(f"| {way} | {match:.3f} | {found:.3f} | {seconds:.2f} |")
    return lines


def forms_table(
    model: GritLM, questions: Sequence[tuple[str, str]], indexes: Mapping[str, DocumentIndex]
) -> list[str]:
    """Returns the lines of a table of all forms of stored caches, for the way document-cache."""
    answers = {}
    for form, index in indexes.items():
        answerer = RagPipeline(model, index, "document-cache", answer_prefix="")
        asked = answerer.ask([question for question, _ in questions], NEW_TOKENS)
        answers[form] = [one.answer for one in asked]
    lines = ["| stored as | answers that changed | match |", "|---|---|---|"]
    for form, own in answers.items():
        changed = sum(a != b for a, b in zip(own, answers[EXACT], strict=True))
        match = statistics.mean(e in a for (_, e), a in zip(questions, own, strict=True))
        lines.append(f"| {form} | {changed} of {len(own)} | {match:.3f} |")
    return lines


def read_questions(data: Path, most: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns held-out questions with the definitions that answer them, and all definitions.

    Args:
      data: made by `experiments.build_data`.
      most: questions.
    """
    corpus = data / "evaluation" / "corpora" / "wordnet_senses" / f"documents{SUFFIX}"
    documents = [line["text"] for line in read_lines(corpus)]
    known = set(documents)
    chats = [line["text"] for line in read_lines(data / "held_out" / f"wordnet_chat{SUFFIX}")]
    return [(user, answer) for user, answer in chats if answer in known][:most], documents


def answered_alone(model: GritLM, questions: Sequence[tuple[str, str]]) -> float:
    """Returns how often the model answers as it should without any document."""
    prompts = [chat_prompt(question, is_first=True) for question, _ in questions]
    answers = model.generate(prompts, NEW_TOKENS)
    expected = [answer for _, answer in questions]
    return statistics.mean(e in a for e, a in zip(expected, answers, strict=True))


def measure(
    answerer: RagPipeline, questions: Sequence[tuple[str, str]], documents: Sequence[str]
) -> tuple[float, float]:
    """Returns how often the answer, and how often the document, is the right one."""
    answered = answerer.ask([question for question, _ in questions], NEW_TOKENS)
    pairs = list(zip((answer for _, answer in questions), answered, strict=True))
    match = statistics.mean(expected in one.answer for expected, one in pairs)
    found = statistics.mean(documents[one.document_ids[0]] == expected for expected, one in pairs)
    return match, found


def time_of_an_answer(answerer: RagPipeline, questions: Sequence[str]) -> float:
    """Returns the median of seconds, of questions that are asked one by one."""
    answerer.ask(questions[0], NEW_TOKENS)
    seconds = []
    for question in questions[:TIMED]:
        start = time.perf_counter()
        answerer.ask(question, NEW_TOKENS)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
