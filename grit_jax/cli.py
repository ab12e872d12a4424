"""The console command grit-jax: each subcommand in its own words, errors in one line."""

import argparse
from collections.abc import Callable, Sequence
import os
from pathlib import Path
import signal
import sys
import traceback
from typing import Any

USAGE_ERROR = 2
INTERRUPTED = 128 + signal.SIGINT  # As shells have it.


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `grit-jax` with these arguments, by default those of the process."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "train": train,
        "prepare": prepare,
        "convert": convert,
        "plan": plan,
        "rag": rag,
        "evaluate": evaluate,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: grit-jax {{{','.join(commands)}}} ...\n\n{_summaries(commands)}")
        return
    if argv[0] not in commands:
        fail(f"grit-jax: unknown command {argv[0]!r}; there are: {', '.join(commands)}")
    try:
        commands[argv[0]](argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _summaries(commands: dict) -> str:
    lines = [f"  {name:10}{command.__doc__.splitlines()[0]}" for name, command in commands.items()]
    return "\n".join([*lines, "", "grit-jax COMMAND --help says more."])


def fail(message: str) -> None:
    """Prints one line to standard error and ends the process."""
    print(message, file=sys.stderr)
    raise SystemExit(USAGE_ERROR)


def train(argv: Sequence[str] | None = None) -> None:
    """Trains a model: --config FILE [--workdir DIR] [--config.FIELD=VALUE ...]"""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{train.__doc__}\n\nThe fields are those of grit_jax/config.py.")
        return
    from etils import epath

    from grit_jax.bucket import BucketError, in_bucket, is_transient_storage_error, open_bucket
    from grit_jax.config import ConfigError
    from grit_jax.config_flags import parse_flags
    from grit_jax.data.manifest import PreparedDataError
    from grit_jax.processes import ProcessError, connect, exit_now, is_primary
    from grit_jax.run import run
    from grit_jax.sharding import MeshError
    from grit_jax.training.checkpoints import CheckpointError, RestartRequired
    from grit_jax.training.hooks.preemption import EXIT_CODE, Preempted
    from grit_jax.training.loop import NotFiniteError

    known = (
        BucketError,
        ConfigError,
        MeshError,
        PreparedDataError,
        CheckpointError,
        NotFiniteError,
        ProcessError,
    )
    try:
        config, workdir = parse_flags(argv)
        connect()
        run(config, open_bucket(workdir) if in_bucket(workdir) else epath.Path(workdir).resolve())
    except known as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        # A bucket that was there at the start may be there again.
        is_passing = isinstance(error, RestartRequired) or is_transient_storage_error(
            error.__cause__
        )
        exit_now(EXIT_CODE if is_passing else USAGE_ERROR)
    except Preempted as reason:
        if is_primary():
            print(f"{reason}; the same command continues", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None
    except KeyboardInterrupt:
        line = "interrupted; the same command goes on from the newest checkpoint"
        print(line, file=sys.stderr, flush=True)
        # All is closed. In an orderly end, what was interrupted in compiling would crash.
        os._exit(INTERRUPTED)
    except BaseException:
        traceback.print_exc()
        exit_now(1)


def prepare(argv: Sequence[str]) -> None:
    """Tokenizes datasets once, into files that training reads in random order."""
    from grit_jax.data.manifest import PreparedDataError
    from grit_jax.prepare.prepare import prepare_mixtures
    from grit_jax.text.examples import TextOptions
    from grit_jax.text.jsonl import SourceError
    from grit_jax.text.tokenizer import Tokenizer, TokenizerError
    from grit_jax.user_modules import ModuleError

    arguments = _prepare_parser().parse_args(argv)
    known = (ModuleError, PreparedDataError, SourceError, TokenizerError, OSError)
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
    except known as error:
        fail(f"{type(error).__name__}: {error}")
    except ModuleNotFoundError as error:
        needs_seqio = error.name in ("seqio", "tensorflow", "tensorflow_datasets")
        extra = "data" if needs_seqio else "prepare"
        fail(f"grit-jax prepare needs the package {error.name}: pip install 'grit-jax[{extra}]'")
    except KeyboardInterrupt:
        fail("interrupted; finished datasets stay: run the command again to go on")
    else:
        print(f"{arguments.output}: prepared {', '.join(mixtures)}")


def _prepare_parser() -> argparse.ArgumentParser:
    from grit_jax.text.examples import CHAT_LABELS, TextOptions
    from grit_jax.text.kinds import STREAMS
    from grit_jax.text.tokenizer import MISTRAL

    parser = argparse.ArgumentParser(
        prog="grit-jax prepare",
        description=prepare.__doc__,
        epilog="A line is {'query': ..., 'pos': [...], 'neg': [...]}, {'messages': [...]}, "
        "{'text': [user, assistant, ...]} or {'text': ...}; each file is a dataset. Datasets that "
        "are up to date are left alone.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a folder or file of .jsonl or .jsonl.gz, as PATH or NAME=PATH (medi2=PATH, e5=PATH "
        "and tulu2=PATH for these collections as published); or the name of a mixture "
        "(sample_embedding, sample_chat, squad_embedding, or one of yours)",
    )
    parser.add_argument("--output", required=True, help="folder for the prepared datasets")
    parser.add_argument(
        "--tokenizer",
        default=MISTRAL,
        help="'mistral' or the path of a tokenizer.model (SentencePiece) or tokenizer.json",
    )
    parser.add_argument(
        "--module", action="append", default=[], help="Python module that declares mixtures"
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def convert(argv: Sequence[str]) -> None:
    """Converts weights: from-hf FOLDER CHECKPOINT, from-gguf FILE CHECKPOINT, to-hf MODEL FOLDER"""
    parser = argparse.ArgumentParser(prog="grit-jax convert", description=convert.__doc__)
    directions = parser.add_subparsers(dest="direction", required=True)
    from_hf = directions.add_parser("from-hf", help="Hugging Face folder to Orbax checkpoint")
    from_gguf = directions.add_parser("from-gguf", help="GGUF file to Orbax checkpoint")
    to_hf = directions.add_parser("to-hf", help="checkpoint or run's folder to Hugging Face folder")
    from_hf.add_argument("source", type=_on_disk, help="the model")
    from_gguf.add_argument("source", type=_on_disk, help="the file")
    from_gguf.add_argument(
        "--tokenizer",
        help="path of a tokenizer.model or tokenizer.json; by default the one in the file",
    )
    to_hf.add_argument("source", help="the model, which may be gs://BUCKET/FOLDER")
    for direction in (from_hf, from_gguf, to_hf):
        direction.add_argument("destination", type=_on_disk, help="folder to make")
    from_hf.add_argument(
        "--head",
        help="for a checkpoint without lm_head: 'tied' to use its token embeddings, or the folder "
        "of a base model to take its head",
    )
    to_hf.add_argument(
        "--base", help="where the model that LoRA's updates were trained on lies now, if it moved"
    )
    to_hf.add_argument(
        "--tokenizer",
        help="'mistral' or the path of a tokenizer.model or tokenizer.json; by default the one "
        "that lies with the model, else 'mistral'",
    )
    to_hf.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="by default as stored"
    )
    to_hf.add_argument(
        "--attention",
        choices=("bbcc", "cccc"),  # cbcc has no counterpart in sentence-transformers.
        help="pattern it was trained with; by default what the model says, else bbcc",
    )
    to_hf.add_argument(
        "--pooling",
        choices=("mean", "weightedmean", "lasttoken", "cls"),
        help="of its embeddings; by default what the model says, else mean",
    )
    arguments = parser.parse_args(argv)

    from grit_jax.bucket import BucketError
    from grit_jax.conversion import ConversionError, GgufModel, HuggingFaceModel, open_model
    from grit_jax.conversion.export import write_hugging_face
    from grit_jax.conversion.orbax_model import write_orbax
    from grit_jax.text.tokenizer import TokenizerError

    try:
        if arguments.direction == "from-hf":
            model = HuggingFaceModel(arguments.source, arguments.head)
            write_orbax(model, arguments.destination)
        elif arguments.direction == "from-gguf":
            model = GgufModel(arguments.source, arguments.tokenizer)
            write_orbax(model, arguments.destination)
        else:
            write_hugging_face(
                open_model(arguments.source, base=arguments.base),
                arguments.destination,
                tokenizer=arguments.tokenizer,
                dtype=arguments.dtype,
                attention=arguments.attention,
                pooling=arguments.pooling,
            )
    except (BucketError, ConversionError, TokenizerError, OSError) as error:
        fail(f"{type(error).__name__}: {error}")
    print(f"{arguments.source} -> {arguments.destination}")


def _on_disk(path: str) -> Path:
    if "://" in path:
        raise argparse.ArgumentTypeError(f"{path} must be on a disk: gcloud storage cp -r copies")
    return Path(path)


def plan(argv: Sequence[str]) -> None:
    """Compiles a training step for TPUs without having any, and says whether and how it fits"""
    parser = argparse.ArgumentParser(
        prog="grit-jax plan",
        description=plan.__doc__,
        epilog="--config FILE and --config.FIELD=VALUE are those of grit-jax train.",
    )
    parser.add_argument(
        "--topology", required=True, help="chips of a slice, such as v5e:4x4, v6e:16x16, v5p:4x4x4"
    )
    parser.add_argument("--slices", type=_positive, default=1, help="number of such slices (1)")
    parser.add_argument(
        "--search",
        action="store_true",
        help="try meshes, remat policies and GradCache chunks, and recommend the fastest that fits",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for stream, tokens in (("query", 64), ("passage", 256), ("chat", 1024)):
        help_text = f"tokens of a {stream} on average ({tokens})"
        parser.add_argument(f"--{stream}-tokens", type=_positive, default=tokens, help=help_text)
    arguments, rest = parser.parse_known_args(argv)

    import jax

    from grit_jax.bucket import BucketError
    from grit_jax.config import ConfigError
    from grit_jax.config_flags import parse_flags
    from grit_jax.planning.chips import TopologyError, describe_topology, quiet
    from grit_jax.planning.plan import fastest, make_plan, search
    from grit_jax.planning.report import as_json, show_plan, show_tried
    from grit_jax.sharding import MeshError

    tokens = {name: getattr(arguments, f"{name}_tokens") for name in ("query", "passage", "chat")}
    found: Any = None
    jax.config.update("jax_platforms", "cpu")  # Nothing is run: no device is to be looked for.
    try:
        config, _ = parse_flags(rest)
        if arguments.slices > 1:
            config.mesh.slice = arguments.slices
        with quiet():
            topology = describe_topology(arguments.topology, arguments.slices)
        if not arguments.search:
            found = make_plan(config, topology, tokens)
        else:
            tried = []
            for one in search(config, topology, tokens):
                tried.append(one)
                if not arguments.json:
                    show_tried(one)
            found = fastest(tried)
    except (BucketError, ConfigError, MeshError, TopologyError) as error:
        fail(f"{type(error).__name__}: {error}")
    if found is None:
        fail("none of them fits: take more chips, or a smaller batch")
    elif arguments.json:
        print(as_json(found))
    else:
        show_plan(found)


def rag(argv: Sequence[str]) -> None:
    """Builds an index of documents, or answers questions from one"""
    from grit_jax.rag.command import run

    _use_model(run, argv)


def evaluate(argv: Sequence[str]) -> None:
    """Measures a model by MTEB and by lm-eval, beside the paper's table"""
    from grit_jax.evaluation.evaluate_command import run
    from grit_jax.evaluation.results import ResultsError
    from grit_jax.user_modules import ModuleError

    try:
        _use_model(run, argv, ResultsError, ModuleError)
    except ModuleNotFoundError as error:
        if error.name not in ("mteb", "lm_eval"):
            raise
        fail(f"grit-jax evaluate needs {error.name}: pip install 'grit-jax[harnesses]'")


def _use_model(
    run: Callable[[Sequence[str]], None], argv: Sequence[str], *own: type[Exception]
) -> None:
    """Runs a command that reads a model; what can be wrong with one is said in a line."""
    from grit_jax.bucket import BucketError
    from grit_jax.conversion import ConversionError
    from grit_jax.inference.prompt_encoder import InputError
    from grit_jax.sharding import MeshError
    from grit_jax.text.tokenizer import TokenizerError

    known = (BucketError, ConversionError, InputError, MeshError, TokenizerError, OSError)
    try:
        run(argv)
    except (*known, *own) as error:
        fail(f"{type(error).__name__}: {error}")
