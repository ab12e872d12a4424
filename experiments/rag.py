"""Answers with the trained model, by each way of caching: python -m experiments.rag CLAIM_FOLDER

The documents are the definitions of words that were not trained on; the questions ask what such a
word means in a sentence. An answer matches if it has the definition in it. Written beside: how
often the right document was found, and how long an answer takes, the search included.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
import statistics
import sys
import tempfile
import time

from experiments.files import SUFFIX, read_lines
from grit_jax import GritLM
from grit_jax.data.templates import chat_prompt
from grit_jax.inference.index import DocumentIndex, build_index
from grit_jax.inference.rag import WAYS, Answerer

NEW_TOKENS = 32
# Questions that are timed, one at a time, after one that is not.
TIMED = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table in Markdown, and writes it beside the others."""
    parser = argparse.ArgumentParser(description="Answer held-out questions by each way of RAG.")
    parser.add_argument("folder", type=Path, help="of experiments.claim, complete")
    parser.add_argument("--run", default="unified_0", help="folder of the run (unified_0)")
    parser.add_argument("--data", type=Path, help="made by experiments.build_data (FOLDER/data)")
    parser.add_argument("--most", type=int, default=100, help="questions (100)")
    options = parser.parse_args(arguments)
    model = GritLM.from_pretrained(options.folder / "runs" / options.run, dtype="float32")
    questions, documents = read_questions(options.data or options.folder / "data", options.most)
    lines = ["| way | match | right document | seconds an answer |", "|---|---|---|---|"]
    match = answered_alone(model, questions)
    lines.append(f"| without documents | {match:.3f} | | |")
    with tempfile.TemporaryDirectory() as folder:
        texts = [{"text": text} for text in documents]
        build_index(model, texts, Path(folder) / "index", caches="float32")
        index = DocumentIndex(Path(folder) / "index", model)
        for way in WAYS:
            answerer = Answerer(model, index, way, answer_prefix="")
            match, found = measure(answerer, questions, documents)
            seconds = time_of_an_answer(answerer, [question for question, _ in questions])
            lines.append(f"| {way} | {match:.3f} | {found:.3f} | {seconds:.2f} |")
    text = "\n".join(lines) + "\n"
    (options.folder / "rag.md").write_text(text)
    print(text)
    return 0


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
    answerer: Answerer, questions: Sequence[tuple[str, str]], documents: Sequence[str]
) -> tuple[float, float]:
    """Returns how often the answer, and how often the document, is the right one."""
    answered = answerer.ask([question for question, _ in questions], NEW_TOKENS)
    pairs = list(zip((answer for _, answer in questions), answered, strict=True))
    match = statistics.mean(expected in one.answer for expected, one in pairs)
    found = statistics.mean(documents[one.numbers[0]] == expected for expected, one in pairs)
    return match, found


def time_of_an_answer(answerer: Answerer, questions: Sequence[str]) -> float:
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
