"""What a prepared dataset depends on, as SHA-256 sums: a changed one has the dataset made again."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from etils import epath

from grit_jax.text import (
    examples,
    formats,
    hugging_face_tokenizer,
    jsonl,
    kinds,
    sentencepiece_tokenizer,
    templates,
)
from grit_jax.text import tokenizer as tokenizer_module
from grit_jax.text.examples import TextOptions
from grit_jax.text.jsonl import MEGABYTE, JsonlFiles
from grit_jax.text.tokenizer import Tokenizer

# The code that decides which ids a line becomes.
TEXT_MODULES = (
    examples,
    formats,
    hugging_face_tokenizer,
    jsonl,
    kinds,
    sentencepiece_tokenizer,
    templates,
    tokenizer_module,
)

# Values whose repr says what they are, in every process alike.
PLAIN_TYPES = (str, int, float, tuple, list, dict, Path, type(None))


def fingerprint(value: Any) -> str:
    """Returns the SHA-256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprints(
    tokenizer: Tokenizer, options: TextOptions, source: dict[str, Any]
) -> dict[str, str]:
    """Returns all that the content of a dataset depends on, by names fit for a message."""
    return {
        "tokenizer": tokenizer.fingerprint,
        "options": fingerprint(dataclasses.asdict(options)),
        "templates": _text_code(),
        "source": fingerprint(source),
    }


@functools.cache
def _text_code() -> str:
    return fingerprint([Path(inspect.getfile(module)).read_text() for module in TEXT_MODULES])


def describe_files(files: JsonlFiles) -> dict[str, Any]:
    """Returns what a dataset of files is made from, each file with its size and its SHA-256."""
    described: dict[str, Any] = {
        "files": {
            split: [describe_file(file) for file in own] for split, own in files.files.items()
        }
    }
    if files.preprocess is not None:
        described["preprocess"] = describe_functions([files.preprocess])
    if files.held_out:
        described |= {"held_out": files.held_out, "seed": files.seed}
    return described


def describe_file(file: epath.Path) -> dict[str, Any]:
    """Returns a file's name, size and SHA-256."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(MEGABYTE):
            digest.update(chunk)
    return {"name": file.name, "bytes": file.stat().length, "sha256": digest.hexdigest()}


def describe_functions(functions: Sequence[Callable]) -> list[dict[str, str]]:
    """Returns the names of functions, and sums of the files that they are written in."""
    return [_describe_function(function) for function in functions]


def _describe_function(function: Any) -> dict[str, str]:
    if isinstance(function, functools.partial):
        arguments = repr((function.args, sorted(function.keywords.items())))
        return _describe_function(function.func) | {"arguments": arguments}
    function = inspect.unwrap(function)
    if not hasattr(function, "__qualname__"):  # An object that can be called.
        function = type(function)
    described = {"name": f"{function.__module__}.{function.__qualname__}"}
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if plain := [repr(value) for value in cells if isinstance(value, PLAIN_TYPES)]:
        described["closure"] = ", ".join(plain)
    try:
        code = Path(inspect.getfile(function)).read_text()
    except (TypeError, OSError):  # Built in.
        return described
    return described | {"sha256": hashlib.sha256(code.encode()).hexdigest()}
