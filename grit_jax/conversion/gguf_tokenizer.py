"""The tokenizer that the metadata of a GGUF file describe, as a file of its own kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from grit_jax.conversion.safetensors_folder import ConversionError
from grit_jax.text.tokenizer import HUGGING_FACE, SENTENCEPIECE

# Types of tokens, which GGUF numbers as SentencePiece does.
CONTROL, USER_DEFINED, BYTE = 3, 4, 6
# How text is split into words before it is merged, as the models' own tokenizer.json say it.
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

# Returns a value of the metadata, or a default: value(key, default).
Value = Callable[..., Any]


def gguf_tokenizer(path: Path, value: Value) -> tuple[str, bytes, dict[str, str]]:
    """Returns the tokenizer of a GGUF file: name of its file, content, and special tokens.

    Args:
      path: of the GGUF file, for messages.
      value: returns a value of its metadata.

    Raises:
      ConversionError: the tokenizer is of a kind that is not known.
    """
    kind = value("tokenizer.ggml.model")
    tokens = value("tokenizer.ggml.tokens")
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown")):
        number = value(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            special[f"{name}_token"] = tokens[number]
    if missing := {"bos_token", "eos_token"} - special.keys():
        raise ConversionError(f"{path} does not say what its {min(missing)} is")
    if kind == "gpt2":
        return HUGGING_FACE, _byte_pairs(path, tokens, value), special
    if kind == "llama":
        return SENTENCEPIECE, _sentencepiece(tokens, special, value), special
    raise ConversionError(
        f"{path} has a tokenizer of the kind {kind!r}, which is not known: give the original "
        "model's (tokenizer=PATH, or --tokenizer PATH)"
    )


def _byte_pairs(path: Path, tokens: list[str], value: Value) -> bytes:
    """Returns the content of a tokenizer.json for pairs of bytes, merged one after the other."""
    split = value("tokenizer.ggml.pre", GPT_2)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[tuple(pair.split(" ")) for pair in value("tokenizer.ggml.merges")],
            # A word that is a token is taken whole, even if no merges lead to it.
            ignore_merges=split in PATTERNS,
        )
    )
    of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split not in PATTERNS)
    if split == GPT_2:
        tokenizer.pre_tokenizer = of_bytes
    elif split == SMOLLM:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, of_bytes])
    elif split in PATTERNS:
        words = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[split]), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, of_bytes])
    else:
        known = ", ".join((GPT_2, SMOLLM, *PATTERNS))
        raise ConversionError(
            f"{path} splits text as {split!r}, which is not known, only {known}: give the original "
            "model's tokenizer.json (tokenizer=PATH, or --tokenizer PATH)"
        )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = value("tokenizer.ggml.token_type", [])
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (CONTROL, USER_DEFINED):
            is_special = kind == CONTROL
            added = tokenizers.AddedToken(token, normalized=False, special=is_special)
            (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([added])
    return tokenizer.to_str(pretty=True).encode()


def _sentencepiece(tokens: list[str], special: dict[str, str], value: Value) -> bytes:
    """Returns the content of a SentencePiece model of the same pieces and scores.

    Its texts are not normalised, which is not said in the file: no Llama and no Mistral does.
    """
    from sentencepiece import sentencepiece_model_pb2  # Needs protobuf, of the extra `gguf`.

    model: Any = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009  made when imported
    kinds, scores = value("tokenizer.ggml.token_type"), value("tokenizer.ggml.scores")
    for token, kind, score in zip(tokens, kinds, scores, strict=True):
        model.pieces.add(piece=token, type=kind, score=score)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = BYTE in kinds
    for name, token in special.items():
        setattr(trainer, name.replace("token", "id"), tokens.index(token))
        setattr(trainer, name.replace("token", "piece"), token)
    trainer.pad_id = -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = value("tokenizer.ggml.add_space_prefix", True)
    normalizer.remove_extra_whitespaces = value("tokenizer.ggml.remove_extra_whitespaces", False)
    normalizer.escape_whitespaces = True
    return model.SerializeToString()
