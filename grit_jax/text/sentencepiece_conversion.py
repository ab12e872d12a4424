"""SentencePiece models as tokenizers of Hugging Face with the same ids for every text."""

from collections import defaultdict
import re
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

# The character for a space in SentencePiece.
SPACE = "\u2581"
# Types of pieces, and of models.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
BYTE_PAIR_ENCODING = 2


def convert_sentencepiece(
    model: bytes, names: dict[int, str] | None = None, *, is_legacy: bool = True
) -> tokenizers.Tokenizer:
    """Returns the tokenizer with the pieces of a SentencePiece model.

    Args:
      model: content of the model file.
      names: other names of pieces, by their ids.
      is_legacy: whether a space is inserted before the text after each added token, as before the
        whole text (`legacy` in tokenizer_config.json).

    Raises:
      ValueError: no tokenizer of Hugging Face has the same ids; the message says why.
    """
    proto = parse_model(model)
    pieces: list[str] = [piece.piece for piece in proto.pieces]
    for i, piece in (names or {}).items():
        pieces[i] = piece
    types: list[int] = [piece.type for piece in proto.pieces]
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != BYTE_PAIR_ENCODING:
        raise ValueError("its model is not byte-pair encoding, and tokenizer.json has no equal one")
    if trainer.treat_whitespace_as_suffix or not rules.escape_whitespaces:
        raise ValueError("it has settings that a tokenizer.json cannot express")
    user_defined = [
        piece for piece, kind in zip(pieces, types, strict=True) if kind == USER_DEFINED
    ]
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=_merges(pieces, types, [piece.score for piece in proto.pieces]),
            unk_token=pieces[trainer.unk_id] if trainer.unk_id >= 0 else None,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
            ignore_merges=bool(user_defined),
        )
    )
    made.normalizer = _normalizer(rules, is_legacy)
    made.pre_tokenizer = _pre_tokenizer(rules, user_defined, is_legacy)
    made.decoder = _decoder(rules)
    made.add_special_tokens(
        [
            tokenizers.AddedToken(piece, special=True, normalized=False)
            for piece, kind in zip(pieces, types, strict=True)
            if kind in (UNKNOWN, CONTROL)
        ]
    )
    return made


def has_user_defined(model: bytes) -> bool:
    """Returns whether a SentencePiece model has pieces that are never split nor merged."""
    return any(piece.type == USER_DEFINED for piece in parse_model(model).pieces)


def parse_model(model: bytes) -> Any:
    """Returns the protocol buffer of a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009  made at import
    proto.ParseFromString(model)
    return proto


def _merges(pieces: list[str], types: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Returns the merges, in the order in which SentencePiece prefers the merged pieces.

    Of several pieces with one score, it prefers the leftmost in the text. Only for runs of one
    character, such as Mistral's runs of spaces, is there an order that gives the same: a run then
    grows from the left as long as it can, so longer runs come first.
    """
    normal = {
        piece: (-score, -len(piece), i)
        for i, (piece, kind, score) in enumerate(zip(pieces, types, scores, strict=True))
        if kind == NORMAL
    }
    ranked = [
        (*rank, piece[:split], piece[split:])
        for piece, rank in normal.items()
        for split in range(1, len(piece))
        if piece[:split] in normal and piece[split:] in normal
    ]
    tied = defaultdict(set)
    for score, _, _, left, right in ranked:
        tied[score].add(left + right)
    if any(len(group) > 1 and len({*"".join(group)}) > 1 for group in tied.values()):
        raise ValueError("several of its pieces have one score, which a tokenizer.json cannot have")
    if not {*"".join(normal)} <= normal.keys():
        raise ValueError("it has pieces of characters that are no pieces themselves")
    unused = {piece for piece, kind in zip(pieces, types, strict=True) if kind == UNUSED}
    parts = normal.keys() | unused
    for piece in unused:
        if any(piece[:i] in parts and piece[i:] in parts for i in range(1, len(piece))):
            raise ValueError(f"its unused piece {piece!r} can be merged from others")
    return [(left, right) for *_, left, right in sorted(ranked)]


def _normalizer(rules: Any, is_legacy: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if rules.add_dummy_prefix and is_legacy:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _pre_tokenizer(
    rules: Any, user_defined: list[str], is_legacy: bool
) -> pre_tokenizers.PreTokenizer | None:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if rules.add_dummy_prefix and not is_legacy:
        steps.append(pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False))
    if user_defined:  # SentencePiece never splits them, nor joins them to what surrounds them.
        longest_first = sorted(user_defined, key=len, reverse=True)
        pattern = "|".join(re.escape(piece.replace(" ", SPACE)) for piece in longest_first)
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    return pre_tokenizers.Sequence(steps) if steps else None


def _decoder(rules: Any) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
