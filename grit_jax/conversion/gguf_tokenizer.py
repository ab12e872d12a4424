"""The tokenizer in the metadata of a GGUF file, as a tokenizer.json or tokenizer.model."""

from collections.abc import Callable
import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from grit_jax.conversion.stored_model import ConversionError
from grit_jax.text.sentencepiece_conversion import parse_model
from grit_jax.text.tokenizer_files import (
    CHAT_TEMPLATE,
    GRIT,
    HUGGING_FACE,
    SENTENCEPIECE,
    SETTINGS,
)

# Token types, numbered as in SentencePiece.
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
# Patterns that split text into words before merging, from the models' own tokenizer.json.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"llama-bpe": LLAMA_3, "llama3": LLAMA_3, "llama-v3": LLAMA_3, "tekken": TEKKEN}
GPT_2, SMOLLM = "gpt-2", "smollm"

# Looks up metadata: get_metadata(key, default).
GetMetadata = Callable[..., Any]


def gguf_tokenizer_files(path: Path, get_metadata: GetMetadata) -> dict[str, bytes]:
    """Returns the tokenizer of a GGUF file: names and contents of files of transformers.

    Args:
      path: the GGUF file, for error messages.
      get_metadata: looks up the file's metadata.

    Raises:
      ConversionError: the tokenizer is of an unknown kind.
    """
    kind = get_metadata("tokenizer.ggml.model")
    if kind is None:
        raise ConversionError(f"{path} has no tokenizer: give one (tokenizer=PATH)")
    tokens = get_metadata("tokenizer.ggml.tokens")
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown")):
        token_id = get_metadata(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            special[f"{name}_token"] = tokens[token_id]
    if "eos_token" not in special:
        raise ConversionError(f"{path} has a tokenizer without eos_token")
    if kind == "gpt2":
        name, content = HUGGING_FACE, _byte_pair_encoding(path, tokens, get_metadata)
    elif kind == "llama":
        name, content = SENTENCEPIECE, _sentencepiece(tokens, special, get_metadata)
    else:
        raise ConversionError(
            f"{path} has a tokenizer of the unknown kind {kind!r}: give the original model's "
            "tokenizer (tokenizer=PATH, or --tokenizer PATH)"
        )
    # The defaults are those of llama.cpp.
    adds_bos = kind == "llama" or get_metadata("tokenizer.ggml.pre", GPT_2) in PATTERNS
    adds_bos = get_metadata("tokenizer.ggml.add_bos_token", adds_bos) and "bos_token" in special
    adds_eos = get_metadata("tokenizer.ggml.add_eos_token", False)
    around = {
        "begin": [special["bos_token"]] if adds_bos else [],
        "end": [special["eos_token"]] if adds_eos else [],
    }
    files = {name: content, SETTINGS: json.dumps({**special, GRIT: around}).encode()}
    if template := get_metadata("tokenizer.chat_template"):
        files[CHAT_TEMPLATE] = template.encode()
    return files


def _byte_pair_encoding(path: Path, tokens: list[str], get_metadata: GetMetadata) -> bytes:
    """Returns the content of a tokenizer.json for byte-pair encoding."""
    split = get_metadata("tokenizer.ggml.pre", GPT_2)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=[tuple(pair.split(" ")) for pair in get_metadata("tokenizer.ggml.merges")],
            # A word that is a token stays whole, even if no merges produce it.
            ignore_merges=split in PATTERNS,
        )
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split not in PATTERNS)
    if split == GPT_2:
        tokenizer.pre_tokenizer = byte_level
    elif split == SMOLLM:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    elif split in PATTERNS:
        words = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[split]), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    else:
        known = ", ".join((GPT_2, SMOLLM, *PATTERNS))
        raise ConversionError(
            f"{path} splits text as {split!r}, which is unknown (known are {known}): give the "
            "original model's tokenizer.json (tokenizer=PATH, or --tokenizer PATH)"
        )
    tokenizer.decoder = decoders.ByteLevel()
    token_types = get_metadata("tokenizer.ggml.token_type", [])
    for token, token_type in zip(tokens, token_types, strict=False):
        if token_type in (CONTROL, USER_DEFINED):
            is_special = token_type == CONTROL
            added = tokenizers.AddedToken(token, normalized=False, special=is_special)
            (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([added])
    return tokenizer.to_str(pretty=True).encode()


def _sentencepiece(tokens: list[str], special: dict[str, str], get_metadata: GetMetadata) -> bytes:
    """Returns the content of a SentencePiece model with the same pieces and scores.

    GGUF does not store the normalization of text. Llama and Mistral have none.
    """
    model = parse_model(b"")
    token_types = get_metadata("tokenizer.ggml.token_type")
    scores = get_metadata("tokenizer.ggml.scores")
    for token, token_type, score in zip(tokens, token_types, scores, strict=True):
        model.pieces.add(piece=token, type=token_type, score=score)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = BYTE in token_types
    trainer.bos_id = -1
    for name, token in special.items():
        setattr(trainer, name.replace("token", "id"), tokens.index(token))
        setattr(trainer, name.replace("token", "piece"), token)
    trainer.pad_id = -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = get_metadata("tokenizer.ggml.add_space_prefix", True)
    normalizer.remove_extra_whitespaces = get_metadata(
        "tokenizer.ggml.remove_extra_whitespaces", False
    )
    normalizer.escape_whitespaces = True
    return model.SerializeToString()
