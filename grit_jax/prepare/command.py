"""The command `grit-jax prepare`."""

import argparse
from collections.abc import Sequence
import sys

from grit_jax.prepare.prepare import prepare_mixtures
from grit_jax.text.examples import CHAT_LABELS, TextOptions
from grit_jax.text.tokenizer import MISTRAL, Tokenizer


def run(argv: Sequence[str]) -> None:
    """Tokenizes datasets once, so that training reads tokens in any order.

    Raises:
      ModuleError, PreparedDataError, SourceError, TokenizerError: the message says what is wrong.
    """
    arguments = _parser().parse_args(argv)
    try:
        mixtures = prepare_mixtures(
            arguments.sources,
            arguments.module,
            arguments.output,
            Tokenizer(arguments.tokenizer),
            TextOptions(
                query_length=arguments.query_length,
                passage_length=arguments.passage_length,
                chat_length=arguments.chat_length,
                chat_labels=arguments.chat_labels,
            ),
            processes=arguments.processes,
            held_out=arguments.held_out,
            seed=arguments.seed,
            max_rejected=arguments.max_rejected,
            redo=arguments.redo,
        )
    except KeyboardInterrupt:
        print(
            "interrupted; finished datasets stay: run the command again to continue",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    print(f"{arguments.output}: prepared {', '.join(mixtures)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grit-jax prepare",
        description="Tokenizes datasets once, so that training reads tokens in any order.",
        epilog="A file is a dataset. Its lines are {'query': ..., 'pos': [...], 'neg': [...]}, "
        "{'messages': [...]}, {'text': [user, assistant, ...]} or {'text': ...}. Datasets that "
        "were prepared before from the same files with the same options are kept.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a file or folder of .jsonl or .jsonl.gz, as PATH or NAME=PATH (medi2=PATH, e5=PATH "
        "and tulu2=PATH take those datasets as they are published); or the name of a seqio Mixture "
        "(sample_embedding, sample_chat, squad_embedding, or one of yours)",
    )
    parser.add_argument("--output", required=True, help="output folder")
    parser.add_argument(
        "--tokenizer",
        default=MISTRAL,
        help="'mistral' or the path of a tokenizer.model (SentencePiece) or tokenizer.json",
    )
    parser.add_argument(
        "--module", action="append", default=[], help="Python module that declares your Mixtures"
    )
    parser.add_argument(
        "--held-out",
        type=_fraction,
        default=0.0,
        metavar="FRACTION",
        help="fraction of each dataset of a PATH to hold out for evaluation (default 0); not for a "
        "folder with subfolders 'train' and 'held_out'",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the choice of held-out lines (default 0)"
    )
    defaults = TextOptions()
    for stream in ("query", "passage", "chat"):
        length = getattr(defaults, f"{stream}_length")
        help_text = f"maximum tokens of a {stream} (default {length})"
        parser.add_argument(f"--{stream}-length", type=_positive, default=length, help=help_text)
    parser.add_argument(
        "--chat-labels",
        choices=CHAT_LABELS,
        default=defaults.chat_labels,
        help="'original' shifts the labels of later turns by two tokens per turn, as the original "
        "code does",
    )
    parser.add_argument(
        "--max-rejected",
        type=_fraction,
        default=0.1,
        metavar="FRACTION",
        help="maximum fraction of a dataset's lines that may be rejected (default 0.1)",
    )
    parser.add_argument("--processes", type=_positive, help="worker processes (one per core)")
    parser.add_argument("--redo", action="store_true", help="also prepare unchanged datasets again")
    return parser


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value
