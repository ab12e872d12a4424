"""The command `grit-jax convert`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from grit_jax.conversion import GgufModel, HuggingFaceModel, open_model
from grit_jax.conversion.bidirectional_check import warn_if_causal
from grit_jax.conversion.export import (
    DTYPES,
    EXPORTED_PATTERNS,
    GENERATION,
    PURPOSES,
    write_hugging_face,
)
from grit_jax.conversion.hub import find_folder
from grit_jax.conversion.orbax_model import write_orbax
from grit_jax.conversion.peft_export import write_adapter
from grit_jax.conversion.stored_model import ConversionError
from grit_jax.conversion.stored_tokenizer import TOKENIZER_NAMES, open_tokenizer
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.objectives.pooling import POOLINGS


def run(argv: Sequence[str]) -> None:
    """Converts weights between Hugging Face folders, GGUF files and Orbax checkpoints.

    Raises:
      BucketError, ConversionError, TokenizerError: the message says what is wrong.
    """
    arguments = _parser().parse_args(argv)

    if arguments.direction == "from-hf":
        model = HuggingFaceModel(find_folder(arguments.source), arguments.head)
        write_orbax(model, arguments.destination)
    elif arguments.direction == "from-gguf":
        given = arguments.tokenizer and open_tokenizer(arguments.tokenizer)
        model = GgufModel(arguments.source, given)
        write_orbax(model, arguments.destination)
    elif arguments.adapter:
        _export_adapter(arguments)
    else:
        model = open_model(arguments.source, base=arguments.base)
        spec = write_hugging_face(
            model,
            arguments.destination,
            purpose=arguments.purpose,
            tokenizer=arguments.tokenizer,
            dtype=arguments.dtype,
            attention=arguments.attention,
            pooling=arguments.pooling,
            query_instruction=arguments.query_instruction,
            document_instruction=arguments.document_instruction,
            license_name=arguments.license,
        )
        if arguments.purpose != GENERATION and spec.attention[1] == "b":
            warn_if_causal(model.fields["model_type"])
    print(f"{arguments.source} -> {arguments.destination}")


def _export_adapter(arguments: argparse.Namespace) -> None:
    if arguments.purpose is not None:
        raise ConversionError("an adapter is one folder: leave out --for, or --adapter")
    model = open_model(arguments.source, base=arguments.base)
    spec = EmbeddingSpec.from_fields(
        model.fields,
        arguments.attention,
        arguments.pooling,
        query_instruction=arguments.query_instruction,
        document_instruction=arguments.document_instruction,
    )
    write_adapter(
        model,
        arguments.destination,
        spec,
        base_name=arguments.base_name,
        tokenizer=arguments.tokenizer,
        dtype=arguments.dtype or "float32",
        license_name=arguments.license,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grit-jax convert",
        description="Converts weights between Hugging Face folders, GGUF files and Orbax "
        "checkpoints.",
    )
    directions = parser.add_subparsers(dest="direction", required=True)
    from_hf = directions.add_parser("from-hf", help="Hugging Face folder to Orbax checkpoint")
    from_gguf = directions.add_parser("from-gguf", help="GGUF file to Orbax checkpoint")
    to_hf = directions.add_parser("to-hf", help="checkpoint or run to Hugging Face folder")
    from_hf.add_argument("source", type=_local_path, help="folder, or name on the Hub")
    from_gguf.add_argument("source", type=_local_path, help="GGUF file")
    from_gguf.add_argument(
        "--tokenizer",
        help=f"{TOKENIZER_NAMES} (default: the one in the file)",
    )
    to_hf.add_argument("source", help="folder of the checkpoint or run; may be gs://BUCKET/FOLDER")
    for direction in (from_hf, from_gguf, to_hf):
        direction.add_argument("destination", type=_local_path, help="output folder")
    from_hf.add_argument(
        "--head",
        help="output projection of a checkpoint without lm_head: 'tied' for its token embeddings, "
        "or the folder of a base model to take it from",
    )
    to_hf.add_argument(
        "--for",
        dest="purpose",
        choices=PURPOSES,
        help="one folder that generates, one that embeds by its config.json alone, or both with "
        "shared weights (default: one folder that generates with transformers and embeds with "
        "sentence-transformers)",
    )
    to_hf.add_argument(
        "--base", help="folder or name of the model that LoRA was trained on, if it has moved"
    )
    to_hf.add_argument(
        "--adapter",
        action="store_true",
        help="write only the LoRA adapter, in PEFT's format, not the merged model",
    )
    to_hf.add_argument(
        "--base-name",
        metavar="NAME_OR_FOLDER",
        help="with --adapter: what adapter_config.json calls the base model (default: its name on "
        "the Hub, else its folder)",
    )
    to_hf.add_argument(
        "--license",
        help="license in the model card, such as apache-2.0 (default: that in the base's card)",
    )
    to_hf.add_argument(
        "--tokenizer",
        help=f"{TOKENIZER_NAMES} (default: the one stored with the model)",
    )
    to_hf.add_argument("--dtype", choices=tuple(DTYPES), help="type (default: as stored)")
    to_hf.add_argument(
        "--attention",
        choices=EXPORTED_PATTERNS,
        help="attention pattern of training (default: as stored with the model, else bbcc)",
    )
    to_hf.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="pooling of embeddings (default: as stored with the model, else mean)",
    )
    for kind in ("query", "document"):
        to_hf.add_argument(
            f"--{kind}-instruction",
            metavar="TEXT",
            help=f"what precedes a {kind} by default, in plain words, '' for nothing "
            "(default: as stored with the model)",
        )
    return parser


def _local_path(path: str) -> Path:
    if "://" in path:
        raise argparse.ArgumentTypeError(
            f"{path} must be on a local disk: copy it with gcloud storage cp -r"
        )
    return Path(path)
