"""The command `grit-jax rag`: builds an index of documents and answers questions from it."""

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys


def run(argv: Sequence[str]) -> None:
    """Builds an index of documents, or answers questions from one.

    Raises:
      InputError, ConversionError: the message names what is wrong.
    """
    arguments = _parser().parse_args(argv)
    if arguments.action == "build":
        _build(arguments)
    else:
        _ask(arguments)


def _build(arguments: argparse.Namespace) -> None:
    from grit_jax.inference.model_options import load_model
    from grit_jax.rag.documents import read_documents
    from grit_jax.rag.index import build_index

    documents = read_documents(arguments.documents)
    count = build_index(
        load_model(arguments),
        documents,
        arguments.index,
        caches=None if arguments.caches == "none" else arguments.caches,
        max_length=arguments.max_length,
        truncate=arguments.truncate,
    )
    print(f"{count} documents added to {arguments.index}")


def _ask(arguments: argparse.Namespace) -> None:
    from grit_jax.inference.model_options import load_model
    from grit_jax.rag.index import DocumentIndex
    from grit_jax.rag.index_folder import read_settings
    from grit_jax.rag.pipeline import RagPipeline

    read_settings(arguments.index)  # Fails before the model is loaded if there is no index.
    model = load_model(arguments)
    index = DocumentIndex(arguments.index, model)
    pipeline = RagPipeline(
        model,
        index,
        arguments.cache_mode,
        num_documents=arguments.num_documents,
        answer_prefix=arguments.answer_prefix,
    )
    questions = arguments.questions
    if questions == ["-"]:
        questions = [line.strip() for line in sys.stdin if not line.isspace()]
    answers = pipeline.ask(questions, arguments.max_new_tokens)
    for question, answer in zip(questions, answers, strict=True):
        print(f"{question}\n{arguments.answer_prefix}{answer.answer}")
        for document_id, score in zip(answer.document_ids, answer.scores, strict=True):
            document = index.documents[document_id]
            print(f"  {score:.3f}  {(document.get('title') or document['text'])[:80]!r}")


def _parser() -> argparse.ArgumentParser:
    from grit_jax.inference.model_options import add_model_options
    from grit_jax.rag.cache_store import FORMATS
    from grit_jax.rag.pipeline import ANSWER_PREFIX, CACHE_MODES

    parser = argparse.ArgumentParser(prog="grit-jax rag")
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="add documents to a new or existing index")
    ask = actions.add_parser("ask", help="answer questions from an index")
    for each in (build, ask):
        add_model_options(each)
    build.add_argument(
        "documents", help="a folder or file of .jsonl, .jsonl.gz, .txt or .md, or tfds:NAME/SPLIT"
    )
    ask.add_argument("questions", nargs="+", help="the questions, or - to read standard input")
    for each in (build, ask):
        each.add_argument("--index", type=Path, required=True, help="folder of the index")
    build.add_argument(
        "--caches",
        default="none",
        choices=("none", *FORMATS),
        help="store the KV cache of each document in this format (none)",
    )
    build.add_argument(
        "--max-length", type=int, help="maximum tokens of a document (the model's context)"
    )
    build.add_argument("--truncate", action="store_true", help="truncate longer documents")
    ask.add_argument(
        "--cache-mode",
        "--way",
        default="document-cache",
        choices=CACHE_MODES,
        help="what is in the prompt as text and what as a KV cache (%(default)s)",
    )
    ask.add_argument(
        "--num-documents", type=int, default=1, help="documents for each question (%(default)s)"
    )
    ask.add_argument(
        "--max-new-tokens", type=int, default=16, help="maximum tokens of an answer (%(default)s)"
    )
    ask.add_argument(
        "--answer-prefix", default=ANSWER_PREFIX, help="the words answers begin with (%(default)r)"
    )
    return parser
