"""Answers from held-out documents in every cache mode: python -m experiments.rag MODEL DATA

Documents are definitions of held-out words; questions ask for the meaning of such a word in a
sentence. An answer matches if it contains the definition. The tables also report how often the
right document was found, the seconds per answer, with search, and, for each storage format of
caches, how many answers differ from float32.
"""

import argparse
from collections.abc import Mapping, Sequence
import dataclasses
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
from grit_jax.rag.pipeline import CACHE_MODES, PAPER_PROMPT, RagPipeline
from grit_jax.text.templates import chat_prompt

NEW_TOKENS = 32
# The chats that the models were trained on have no prefix.
PROMPT = dataclasses.replace(PAPER_PROMPT, answer_prefix="")
EXACT = "float32"  # Reference format of stored caches.
# Number of questions timed one by one, after a warm-up question.
TIMED = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints both tables in Markdown; returns 1 if the model or the data cannot be read."""
    parser = argparse.ArgumentParser(description="Answer held-out questions in every cache mode.")
    parser.add_argument("model", type=Path, help="the folder of a run, or any other model")
    parser.add_argument("data", type=Path, help="output of experiments.build_data")
    parser.add_argument("--most", type=int, default=100, help="maximum number of questions (100)")
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
        print("\n".join(modes_table(model, questions, indexes[EXACT])))
        print("\n".join(["", *formats_table(model, questions, indexes)]))
    return 0


def modes_table(
    model: GritLM,
    questions: Sequence[tuple[str, str]],
    index: DocumentIndex,
) -> list[str]:
    """Returns the lines of a Markdown table of all cache modes."""
    lines = ["| mode | match | right document | seconds per answer |", "|---|---|---|---|"]
    match = match_without_documents(model, questions)
    lines.append(f"| without documents | {match:.3f} | | |")
    for mode in CACHE_MODES:
        pipeline = RagPipeline(model, index, mode, num_documents=1, prompt=PROMPT)
        match, found = measure(pipeline, questions)
        seconds = median_answer_seconds(pipeline, [question for question, _ in questions])
        lines.append(f"| {mode} | {match:.3f} | {found:.3f} | {seconds:.2f} |")
    return lines


def formats_table(
    model: GritLM, questions: Sequence[tuple[str, str]], indexes: Mapping[str, DocumentIndex]
) -> list[str]:
    """Returns the lines of a Markdown table of all storage formats, in mode document-cache."""
    answers = {}
    for form, index in indexes.items():
        pipeline = RagPipeline(model, index, "document-cache", num_documents=1, prompt=PROMPT)
        asked = pipeline.ask([question for question, _ in questions], NEW_TOKENS)
        answers[form] = [one.answer for one in asked]
    lines = ["| stored as | changed answers | match |", "|---|---|---|"]
    for form, own in answers.items():
        changed = sum(a != b for a, b in zip(own, answers[EXACT], strict=True))
        match = statistics.mean(e in a for (_, e), a in zip(questions, own, strict=True))
        lines.append(f"| {form} | {changed} of {len(own)} | {match:.3f} |")
    return lines


def read_questions(data: Path, most: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns held-out (question, definition) pairs, and all definitions.

    Args:
      data: output of `experiments.build_data`.
      most: maximum number of questions.
    """
    corpus = data / "evaluation" / "corpora" / "wordnet_senses" / f"documents{SUFFIX}"
    documents = [line["text"] for line in read_lines(corpus)]
    known = set(documents)
    chats = [line["text"] for line in read_lines(data / "held_out" / f"wordnet_chat{SUFFIX}")]
    return [(user, answer) for user, answer in chats if answer in known][:most], documents


def match_without_documents(model: GritLM, questions: Sequence[tuple[str, str]]) -> float:
    """Returns the fraction of matching answers without documents."""
    prompts = [chat_prompt(question, is_first=True) for question, _ in questions]
    answers = model.generate(prompts, NEW_TOKENS)
    expected = [answer for _, answer in questions]
    return statistics.mean(e in a for e, a in zip(expected, answers, strict=True))


def measure(pipeline: RagPipeline, questions: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """Returns the fractions of matching answers and of right documents."""
    answered = pipeline.ask([question for question, _ in questions], NEW_TOKENS)
    pairs = list(zip((answer for _, answer in questions), answered, strict=True))
    match = statistics.mean(expected in one.answer for expected, one in pairs)
    found = statistics.mean(one.sources[0].document["text"] == expected for expected, one in pairs)
    return match, found


def median_answer_seconds(pipeline: RagPipeline, questions: Sequence[str]) -> float:
    """Returns the median seconds of questions asked one by one."""
    pipeline.ask(questions[0], NEW_TOKENS)
    seconds = []
    for question in questions[:TIMED]:
        start = time.perf_counter()
        pipeline.ask(question, NEW_TOKENS)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
