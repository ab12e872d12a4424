"""The command `grit-jax prepare`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys

from grit_jax.prepare.data_file import FILE_TYPES
from grit_jax.prepare.datasets import COLLECTIONS
from grit_jax.prepare.hub import MODEL, download_tokenizer
from grit_jax.prepare.prepare import prepare_mixtures
from grit_jax.text.chat_template import ChatTemplate
from grit_jax.text.columns import LAYOUTS, ColumnsError, parse_columns
from grit_jax.text.examples import CHAT_LABELS, TextOptions
from grit_jax.text.kinds import STREAMS
from grit_jax.text.templates import BASE, GRIT, embedding_template
from grit_jax.text.tokenizer import Tokenizer, TokenizerError
from grit_jax.text.tokenizer_files import MISTRAL, tokenizer_in


def run(argv: Sequence[str]) -> None:
    """Tokenizes datasets once, into files that training reads in random order.

    Raises:
      BucketError, ConversionError, ModuleError, PreparedDataError, SourceError, TokenizerError:
        the message says what is wrong.
    """
    arguments = _parser().parse_args(argv)
    lengths = {f"{stream}_length": vars(arguments)[f"{stream}_length"] for stream in STREAMS}
    tokenizer = _tokenizer(arguments.tokenizer)
    chat_template = _chat_template(arguments.template, arguments.chat_labels, tokenizer)
    try:
        mixtures = prepare_mixtures(
            arguments.sources,
            arguments.module,
            arguments.output,
            tokenizer,
            TextOptions(
                **lengths,
                chat_labels=arguments.chat_labels,
                chat_template=chat_template,
                embedding_template=arguments.embedding_template,
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


def _chat_template(name: str, labels: str, tokenizer: Tokenizer) -> str:
    """Returns the template of chats in Jinja, "" for GRIT's."""
    own = tokenizer.chat_template
    if name == GRIT:
        if own:
            print("chats are formatted as in GRIT; --template base takes the tokenizer's template")
        return ""
    if not own:
        raise TokenizerError(
            f"tokenizer {tokenizer.name} has no chat template of its own: use --template {GRIT}"
        )
    if labels != TextOptions.chat_labels:
        raise TokenizerError(f"--chat-labels {labels} needs --template {GRIT}")
    ChatTemplate(own, tokenizer)  # Raises if it is not valid.
    return own


def _embedding_template(name: str) -> str:
    try:  # A shell does not turn \n into a line break.
        return embedding_template(name.replace("\\n", "\n"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).replace("\n", "\\n")) from None


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
        help=f"a folder or file, as PATH or NAME=PATH ({', '.join(COLLECTIONS)} are names of "
        f"collections as published), of these types: {FILE_TYPES}; a folder of BEIR or of "
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
        "--template",
        choices=(GRIT, BASE),
        default=GRIT,
        help="the format of chats: 'grit' (the default), or 'base' for the chat template that the "
        "tokenizer's files have",
    )
    parser.add_argument(
        "--embedding-template",
        type=_embedding_template,
        default=GRIT,
        metavar="TEMPLATE",
        help="the format of texts to embed: 'grit' (the default); 'instruct' for 'Instruct: "
        "{instruction}\\nQuery: {text}'; or a format like this. Texts without an instruction then "
        "stand alone",
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
