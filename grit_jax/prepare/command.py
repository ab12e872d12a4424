"""The command `grit-jax prepare`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys

from grit_jax.prepare.data_file import FILE_TYPES
from grit_jax.prepare.hub import MODEL, download_tokenizer
from grit_jax.prepare.prepare import prepare_mixtures
from grit_jax.text.columns import LAYOUTS, ColumnsError, parse_columns
from grit_jax.text.examples import CHAT_LABELS, TextOptions
from grit_jax.text.kinds import STREAMS
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.text.tokenizer_files import MISTRAL, tokenizer_in


def run(argv: Sequence[str]) -> None:
    """Tokenizes datasets once, into files that training reads in random order.

    Raises:
      BucketError, ConversionError, ModuleError, PreparedDataError, SourceError, TokenizerError:
        the message says what is wrong.
    """
    arguments = _parser().parse_args(argv)
    lengths = {f"{stream}_length": vars(arguments)[f"{stream}_length"] for stream in STREAMS}
    try:
        mixtures = prepare_mixtures(
            arguments.sources,
            arguments.module,
            arguments.output,
            _tokenizer(arguments.tokenizer),
            TextOptions(
                **lengths,
                chat_labels=arguments.chat_labels,
            ),
            processes=arguments.processes,
            held_out=arguments.held_out,
            seed=arguments.seed,
            max_rejected=arguments.max_rejected,
            redo=arguments.redo,
            columns=arguments.columns,
        )
    except KeyboardInterrupt:
        print(
            "interrupted; finished datasets stay: run the command again to continue",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    print(f"{arguments.output}: prepared {', '.join(mixtures)}")


def _tokenizer(name: str) -> Tokenizer:
    if MODEL.fullmatch(name) and not Path(name).parent.exists():
        name = str(download_tokenizer(name))
    is_checkpoint = Path(name).is_dir() and tokenizer_in(Path(name)) is None
    if not (is_checkpoint or name.endswith(".gguf") or "://" in name):
        return Tokenizer(name)
    # It loads JAX, which takes seconds.
    from grit_jax.conversion.stored_tokenizer import open_tokenizer

    return open_tokenizer(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grit-jax prepare",
        description="Tokenizes datasets once, into files that training reads in random order.",
        epilog=f"A row has one of these groups of columns: {'; '.join(LAYOUTS)}. Each file is a "
        "dataset. Datasets that are up to date are left alone.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help=f"a folder or file, as PATH or NAME=PATH (medi2=PATH, e5=PATH and tulu2=PATH for "
        f"these collections as published), of these types: {FILE_TYPES}; a folder of BEIR or of "
        "save_to_disk; a dataset of the Hugging Face Hub, as hf:OWNER/NAME or "
        "hf:OWNER/NAME/CONFIG; or the name of a mixture (sample_embedding, sample_chat, "
        "squad_embedding, or one of yours)",
    )
    parser.add_argument("--output", required=True, help="folder for the prepared datasets")
    parser.add_argument(
        "--tokenizer",
        default=MISTRAL,
        help="'mistral', OWNER/MODEL on the Hugging Face Hub, or the path of a tokenizer.model, a "
        "tokenizer.json, a GGUF file, or of a model's, checkpoint's or run's folder",
    )
    parser.add_argument(
        "--module", action="append", default=[], help="Python module that declares mixtures"
    )
    parser.add_argument(
        "--columns",
        type=_columns,
        metavar="NAME=COLUMN,...",
        help="columns of files with other names, such as query=title,pos=body",
    )
    parser.add_argument(
        "--held-out",
        type=_fraction,
        default=0.0,
        metavar="FRACTION",
        help="fraction of each dataset of a PATH to hold out for evaluation (0); not for a folder "
        "with the subfolders 'train' and 'held_out'",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for choosing held-out lines (0)")
    defaults = TextOptions()
    for stream in STREAMS:
        length = getattr(defaults, f"{stream}_length")
        help_text = f"maximum tokens per {stream} ({length})"
        parser.add_argument(f"--{stream}-length", type=_positive, default=length, help=help_text)
    parser.add_argument(
        "--chat-labels",
        choices=CHAT_LABELS,
        default=defaults.chat_labels,
        help="'original': the loss masks of the original code, off by two tokens per turn from the "
        "second turn on",
    )
    parser.add_argument(
        "--max-rejected",
        type=_fraction,
        default=0.1,
        metavar="FRACTION",
        help="fraction of a dataset's lines that may be rejected before it fails (0.1)",
    )
    parser.add_argument("--processes", type=_positive, help="worker processes (one per core)")
    parser.add_argument(
        "--redo", action="store_true", help="also prepare datasets that are up to date"
    )
    return parser


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _columns(text: str) -> dict[str, list[str]]:
    try:
        return parse_columns(text)
    except ColumnsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value
