"""The command `grit-jax rag`: builds an index of documents and answers questions from it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
import json
from pathlib import Path
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grit_jax.rag.pipeline import RagAnswer, RagPipeline, Source

# Documents that are left out are named up to this number.
MAX_NAMED = 20
# Characters of a title that are printed.
TITLE_LENGTH = 80
# Settings of the paper's experiments, for options that are not given.
PAPER = {"cache_mode": "document-cache", "num_documents": 1, "max_new_tokens": 16}
DEFAULTS = {"cache_mode": None, "num_documents": 3, "max_new_tokens": 256}


def run(argv: Sequence[str]) -> None:
    """Builds an index of documents, changes one, or answers questions from one.

    Raises:
      InputError, ConversionError: the message names what is wrong.
    """
    arguments = _parser().parse_args(argv)
    {"build": _build, "ask": _ask, "delete": _delete}[arguments.action](arguments)


def _build(arguments: argparse.Namespace) -> None:
    from grit_jax.inference.model_options import load_model
    from grit_jax.inference.prompt_encoder import InputError
    from grit_jax.rag.documents import read_documents
    from grit_jax.rag.index import build_index
    from grit_jax.rag.index_folder import count_documents

    rejected = _Rejected()
    # Reading everything first finds unreadable documents at once, and the total.
    count = sum(1 for _ in read_documents(arguments.documents, rejected.add))
    if not count:
        raise InputError(f"{arguments.documents} has no document that can be read: see above")
    update = build_index(
        load_model(arguments),
        read_documents(arguments.documents, lambda _: None),
        arguments.index,
        caches=None if arguments.caches == "none" else arguments.caches,
        max_length=arguments.max_length,
        truncate=arguments.truncate,
        instruction=arguments.instruction,
        query_instruction=arguments.query_instruction,
        reject=rejected.add,
        num_documents=count,
    )
    if update.rejected == count:
        raise InputError(f"{arguments.documents} has no document that can be embedded: see above")
    if update.repeated:
        print(
            f"{update.repeated} documents replaced others of {arguments.documents} that have the "
            "same ID: give each document its own ID to keep all",
            file=sys.stderr,
        )
    print(
        f"{arguments.index}: {update.added} documents added, {update.replaced} replaced, "
        f"{update.unchanged} unchanged, {rejected.count} left out; total "
        f"{count_documents(arguments.index)}"
    )


class _Rejected:
    """Names documents that are left out on standard error, and counts them."""

    def __init__(self):
        self.count = 0

    def add(self, reason: str) -> None:
        self.count += 1
        if self.count <= MAX_NAMED:
            print(f"left out: {reason}", file=sys.stderr)
        elif self.count == MAX_NAMED + 1:
            print("left out: more documents, which are only counted", file=sys.stderr)


def _delete(arguments: argparse.Namespace) -> None:
    from grit_jax.rag.index import delete_documents
    from grit_jax.rag.index_folder import count_documents

    ids = arguments.ids
    if ids == ["-"]:
        ids = list(_lines())
    count = delete_documents(arguments.index, ids)
    total = count_documents(arguments.index)
    print(f"{arguments.index}: {count} documents deleted; total {total}")


def _ask(arguments: argparse.Namespace) -> None:
    from grit_jax.inference.model_options import load_model
    from grit_jax.rag.index import DocumentIndex
    from grit_jax.rag.index_folder import read_settings
    from grit_jax.rag.pipeline import ANSWER_PROMPT, PAPER_PROMPT, RagPipeline

    read_settings(arguments.index)  # Fails before the model is loaded if there is no index.
    for name, default in (PAPER if arguments.paper else DEFAULTS).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    prompt = PAPER_PROMPT if arguments.paper else ANSWER_PROMPT
    if arguments.answer_prefix is not None:
        prompt = dataclasses.replace(prompt, answer_prefix=arguments.answer_prefix)
    model = load_model(arguments)
    pipeline = RagPipeline(
        model,
        DocumentIndex(arguments.index, model),
        arguments.cache_mode,
        num_documents=arguments.num_documents,
        instruction=arguments.instruction,
        system=arguments.system,
        prompt=prompt,
    )
    questions = _questions(arguments)
    if arguments.stream or arguments.chat:
        _ask_in_turn(pipeline, questions, arguments)
        return
    questions = list(questions)
    answers = pipeline.ask(questions, arguments.max_new_tokens)
    for question, answer in zip(questions, answers, strict=True):
        answer = dataclasses.replace(answer, answer=prompt.answer_prefix + answer.answer)
        if arguments.json:
            _print_json(question, answer)
        else:
            print(f"{question}\n{answer.answer}")
            _print_sources(answer.sources)


def _ask_in_turn(
    pipeline: RagPipeline, questions: Iterator[str], arguments: argparse.Namespace
) -> None:
    """Answers questions one by one; with `--chat`, each sees the questions and answers before."""
    from grit_jax.inference.prompt_encoder import InputError

    is_interactive = arguments.chat and _is_typed(arguments)
    history: list[Mapping[str, str]] = []
    for question in questions:
        try:
            answer = _stream(pipeline, question, history, arguments)
        except InputError as error:
            if not is_interactive:
                raise
            print(error, file=sys.stderr)
            continue
        if arguments.chat and answer.strip():
            history.append({"role": "user", "content": question})
            history.append({"role": "assistant", "content": answer})


def _stream(
    pipeline: RagPipeline,
    question: str,
    history: Sequence[Mapping[str, str]],
    arguments: argparse.Namespace,
) -> str:
    """Prints an answer while it is generated, and returns it."""
    from grit_jax.rag.pipeline import RagAnswer

    sources, texts = pipeline.stream(question, arguments.max_new_tokens, history=history)
    if not arguments.json and not _is_typed(arguments):
        print(question)
    answer = ""
    for text in itertools.chain([pipeline.prompt.answer_prefix], texts):
        answer += text
        if not arguments.json:
            print(text, end="", flush=True)
    if arguments.json:
        _print_json(question, RagAnswer(answer, sources))
    else:
        print()
        _print_sources(sources)
    return answer


def _questions(arguments: argparse.Namespace) -> Iterator[str]:
    """Yields the questions of the command line, or the lines of standard input."""
    if arguments.questions == ["-"]:
        yield from _lines("> " if _is_typed(arguments) else "")
    else:
        yield from arguments.questions


def _is_typed(arguments: argparse.Namespace) -> bool:
    """Returns whether the questions are typed on a terminal."""
    return arguments.questions == ["-"] and sys.stdin.isatty()


def _lines(prompt: str = "") -> Iterator[str]:
    """Yields the lines of standard input that are not blank."""
    print(prompt, end="", file=sys.stderr, flush=True)
    for line in sys.stdin:
        if stripped := line.strip():
            yield stripped
        print(prompt, end="", file=sys.stderr, flush=True)


def _print_json(question: str, answer: RagAnswer) -> None:
    documents = [
        {"id": source.id, "score": source.score, "document": source.document}
        for source in answer.sources
    ]
    line = {"question": question, "answer": answer.answer, "documents": documents}
    print(json.dumps(line), flush=True)


def _print_sources(sources: Sequence[Source]) -> None:
    for number, source in enumerate(sources, 1):
        document = source.document
        title = " ".join((document.get("title") or document["text"]).split())
        url = document.get("url")
        link = f"  {url}" if isinstance(url, str) else ""
        print(f"  [{number}] {source.score:.3f}  {title[:TITLE_LENGTH]}  (id {source.id}){link}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grit-jax rag", description="Answers questions from documents with one model."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    _add_build(actions)
    _add_ask(actions)
    _add_delete(actions)
    return parser


def _add_build(actions: Any) -> None:
    from grit_jax.inference.model_options import add_model_options
    from grit_jax.rag.cache_store import FORMATS

    build = actions.add_parser(
        "build",
        help="add documents to a new or existing index, or replace those with the same ID",
        description="Adds documents to a new or existing index. A document replaces the one with "
        "the same ID; those that the index already has are skipped.",
    )
    add_model_options(build)
    build.add_argument(
        "documents",
        help="a folder or file of .jsonl, .jsonl.gz, .txt or .md, or tfds:NAME/SPLIT; JSON objects "
        'have "text" and optionally "title", "id" and other fields',
    )
    _add_index(build)
    build.add_argument(
        "--instruction",
        help="instruction for documents in plain words (that of the index or the model)",
    )
    build.add_argument(
        "--query-instruction", help="default instruction for questions (that of the model)"
    )
    build.add_argument(
        "--caches",
        default="none",
        choices=("none", *FORMATS),
        help="store the KV cache of each document in this format (none)",
    )
    build.add_argument(
        "--max-length", type=int, help="maximum tokens of a document (the model's context)"
    )
    build.add_argument(
        "--truncate",
        action="store_true",
        help="truncate longer documents instead of leaving them out",
    )


def _add_ask(actions: Any) -> None:
    from grit_jax.inference.model_options import add_model_options
    from grit_jax.rag.pipeline import CACHE_MODES, PAPER_PROMPT

    ask = actions.add_parser("ask", help="answer questions from an index")
    add_model_options(ask)
    ask.add_argument(
        "questions", nargs="+", help="the questions, or - to read them from standard input"
    )
    _add_index(ask)
    ask.add_argument(
        "--instruction",
        help="instruction for questions in plain words (that of the index or the model)",
    )
    ask.add_argument("--system", help="system message (none)")
    ask.add_argument(
        "--num-documents",
        type=int,
        help=f"documents for each question, at most ({DEFAULTS['num_documents']})",
    )
    ask.add_argument(
        "--max-new-tokens",
        type=int,
        help=f"maximum tokens of an answer ({DEFAULTS['max_new_tokens']})",
    )
    ask.add_argument(
        "--chat",
        action="store_true",
        help="a conversation, with - on the terminal: each question sees the questions and "
        "answers before it; documents are retrieved for the last question alone",
    )
    output = ask.add_mutually_exclusive_group()
    output.add_argument(
        "--stream", action="store_true", help="print answers while they are generated"
    )
    output.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per answer: question, answer and documents",
    )
    ask.add_argument(
        "--cache-mode",
        "--way",
        choices=CACHE_MODES,
        help="what is in the prompt as text and what as a KV cache (document-cache if the index "
        "stores caches, or else document-prompt)",
    )
    ask.add_argument("--answer-prefix", help="the words answers begin with (none)")
    ask.add_argument(
        "--paper",
        action="store_true",
        help=f"the paper's prompt and defaults: {PAPER['num_documents']} document, "
        f"{PAPER['cache_mode']}, {PAPER['max_new_tokens']} tokens, answers that begin with "
        f"{PAPER_PROMPT.answer_prefix!r}",
    )


def _add_delete(actions: Any) -> None:
    delete = actions.add_parser("delete", help="delete documents from an index, by their IDs")
    delete.add_argument(
        "ids", nargs="+", metavar="ID", help="the IDs, or - to read them from standard input"
    )
    _add_index(delete)


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", type=Path, required=True, help="folder of the index")
