"""grit-jax rag: an index of documents is built, and questions are answered from it."""

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys


def run(argv: Sequence[str]) -> None:
    """Builds an index of documents, or answers questions from one

    Raises:
      InputError, ConversionError: the message names what is wrong.
    """
    arguments = _parser().parse_args(argv)

    from grit_jax.inference.model_options import load_model
    from grit_jax.rag.documents import read_documents
    from grit_jax.rag.index import DocumentIndex, build_index
    from grit_jax.rag.index_folder import read_settings
    from grit_jax.rag.pipeline import RagPipeline

    if arguments.action == "build":
        documents = read_documents(arguments.documents)
        model = load_model(arguments)
        caches = None if arguments.caches == "none" else arguments.caches
        options = {"max_length": arguments.max_length, "truncate": arguments.truncate}
        count = build_index(model, documents, arguments.index, caches=caches, **options)
        print(f"{count} documents added to {arguments.index}")
        return
    read_settings(arguments.index)  # Says that there is none before the model is loaded.
    model = load_model(arguments)
    index = DocumentIndex(arguments.index, model)
    answerer = RagPipeline(
        model,
        index,
        arguments.way,
        num_documents=arguments.num_documents,
        answer_prefix=arguments.answer_prefix,
    )
    questions = arguments.questions
    if questions == ["-"]:
        questions = [line.strip() for line in sys.stdin if not line.isspace()]
    answers = answerer.ask(questions, arguments.max_new_tokens)
    for question, answered in zip(questions, answers, strict=True):
        print(f"{question}\n{arguments.answer_prefix}{answered.answer}")
        for number, score in zip(answered.numbers, answered.scores, strict=True):
            document = index.documents[number]
            print(f"  {score:.3f}  {(document.get('title') or document['text'])[:80]!r}")


def _parser() -> argparse.ArgumentParser:
    from grit_jax.inference.model_options import add_model_options
    from grit_jax.rag.cache_store import FORMATS
    from grit_jax.rag.pipeline import ANSWER_PREFIX, CACHE_MODES

    parser = argparse.ArgumentParser(prog="grit-jax rag")
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="add documents to an index, which may be there")
    ask = actions.add_parser("ask", help="answer questions from an index")
    for each in (build, ask):
        add_model_options(each)
    build.add_argument(
        "documents", help="a folder or file of .jsonl, .jsonl.gz, .txt or .md, or tfds:NAME/SPLIT"
    )
    ask.add_argument("questions", nargs="+", help="- for the lines of standard input")
    for each in (build, ask):
        each.add_argument("--index", type=Path, required=True, help="the index's folder")
    build.add_argument(
        "--caches",
        default="none",
        choices=("none", *FORMATS),
        help="store keys and values, for the ways with a document's cache (none)",
    )
    build.add_argument("--max-length", type=int, help="tokens of a document (the model's context)")
    build.add_argument("--truncate", action="store_true", help="cut longer documents")
    ask.add_argument(
        "--way", default="document-cache", choices=CACHE_MODES, help="(document-cache)"
    )
    ask.add_argument("--num-documents", type=int, default=1, help="for each question (1)")
    ask.add_argument("--max-new-tokens", type=int, default=16, help="of an answer (16)")
    ask.add_argument(
        "--answer-prefix", default=ANSWER_PREFIX, help="how answers begin (%(default)r)"
    )
    return parser
