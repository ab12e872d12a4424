"""What a user gives, strings or token ids, as token ids; what cannot be read is an error."""

from collections.abc import Sequence
from typing import Any
import warnings

import numpy as np

from grit_jax.text.examples import Text
from grit_jax.text.tokenizer import Tokenizer

# A text or a prompt: a string, or token ids.
TextLike = str | Sequence[int] | np.ndarray

NO_IDS = np.zeros(0, np.int32)


class InputError(ValueError):
    """A text or a prompt that cannot be read; the message says which, and what to do."""


class PromptEncoder:
    """Makes token ids of strings, and checks those that are given.

    Args:
      tokenizer: of the model, None if it has none.
      vocab_size: number of ids that the model knows.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          InputError: the model has none.
        """
        if self._tokenizer is None:
            raise InputError(
                "no tokenizer (tokenizer.model or tokenizer.json) lies with this model: say "
                "tokenizer=PATH to from_pretrained, or give token ids"
            )
        return self._tokenizer

    def after(self, instruction: TextLike, text: TextLike, *, begin: bool, name: str) -> Text:
        """Returns an instruction and a text behind it; the mask leaves out the instruction.

        A string is tokenised together with the string before it. `<s>`, if it is asked for, goes
        before a string and counts as instruction where there is one; token ids stand for
        themselves.

        Args:
          instruction: may be empty.
          text: must not be empty.
          begin: whether `<s>` goes before it.
          name: of the text, for messages.

        Raises:
          InputError: the text is empty, without a token, not Unicode, or of another type; an id is
            not the model's.
        """
        if isinstance(text, str):
            if not text.strip():
                raise InputError(f"{name} is empty: leave it out")
            if not isinstance(instruction, str):
                self._of_ids(instruction, "the instruction")
                raise InputError(
                    f"the instruction is token ids, so {name} must be too, not a string"
                )
            both = self.of_both(instruction, text, begin=begin, name=name)
            if both.mask.sum() == (begin and not instruction):  # It may drop some characters.
                raise InputError(f"{name} has nothing that the tokenizer keeps: leave it out")
            return both
        ids = self._of_ids(text, name)
        if not len(ids):
            raise InputError(f"{name} is empty: leave it out")
        before = NO_IDS
        if isinstance(instruction, str) and instruction:
            before = self._of_string(instruction, begin, "the instruction")
        elif not isinstance(instruction, str):
            before = self._of_ids(instruction, "the instruction")
        tokens = np.concatenate([before, ids])
        return Text(tokens, np.arange(len(tokens)) >= len(before))

    def of_both(self, before: str, text: str, *, begin: bool, name: str) -> Text:
        """Returns two strings tokenised in one; the mask has what is not the first's alone.

        A token with characters of both belongs to the second, so that it has all of its own.

        Args:
          before: may be empty.
          text: follows it.
          begin: whether `<s>` goes before them; it counts as the first's where there is one.
          name: of `text`, for messages.

        Raises:
          InputError: the text is not Unicode.
        """
        own = self._of_string(before, begin=False, name="the instruction") if before else NO_IDS
        check_unicode(text, name)
        ids, num_before = self.tokenizer.ids_after(before, own, text)
        if begin:
            ids = np.concatenate([[self.tokenizer.bos_id], ids], dtype=np.int32)
            num_before += 1 if before else 0
        return Text(ids, np.arange(len(ids)) >= num_before)

    def _of_string(self, text: str, begin: bool, name: str) -> np.ndarray:
        check_unicode(text, name)
        ids = self.tokenizer.ids(text)
        return np.concatenate([[self.tokenizer.bos_id], ids], dtype=np.int32) if begin else ids

    def _of_ids(self, ids: Any, name: str) -> np.ndarray:
        try:
            array = np.asarray(ids)
        except ValueError:  # Lists of unequal lengths.
            array = np.zeros((0, 0))
        if array.size == 0 and array.ndim == 1:
            return NO_IDS
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise InputError(
                f"{name} is {_kind(ids)}: it must be a string, or one list of token ids"
            )
        if array.min() < 0 or array.max() >= self._vocab_size:
            wrong = array.min() if array.min() < 0 else array.max()
            raise InputError(
                f"{name} has the token id {wrong}, but this model's are 0 to {self._vocab_size - 1}"
            )
        return array.astype(np.int32)


def check_unicode(text: str, name: str) -> None:
    """Checks that a text can be tokenised; `name` is for the message.

    Raises:
      InputError: it has half of a surrogate pair, as JSON's "\\ud83d" is.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} has half of a surrogate pair at character {error.start}: mend the text"
        ) from None


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def as_texts(texts: Any) -> tuple[list[TextLike], bool]:
    """Returns a list of texts, and whether it was one alone: a string, or a list of token ids.

    Raises:
      InputError: there are none.
    """
    if isinstance(texts, str):
        return [texts], True
    if not isinstance(texts, Sequence | np.ndarray):
        raise InputError(f"texts are {_kind(texts)}: give a string, or a list of strings")
    if not len(texts):
        raise InputError("no texts were given: there is nothing to read")
    if isinstance(texts[0], int | np.integer):
        return [texts], True
    return list(texts), False


def as_stop_strings(stop: str | Sequence[str] | None) -> list[str]:
    """Returns a list of the strings before which an answer ends.

    Raises:
      InputError: one is empty or no string.
    """
    strings = [stop] if isinstance(stop, str) else list(stop or ())
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InputError(f"a stop string is {'empty' if string == '' else _kind(string)}")
    return strings


def fit(texts: list[Text], max_length: int, context: int, *, truncate: bool) -> list[Text]:
    """Returns the texts, none of them longer than allowed; cut, with a warning, if asked for.

    Args:
      texts: with their instruction.
      max_length: tokens that are allowed.
      context: tokens that the model is made for.
      truncate: whether to cut what is longer.

    Raises:
      InputError: a text is longer and not to be cut, or nothing but the instruction is left of it.
    """
    if max_length < 1:
        raise InputError(f"max_length={max_length} must be positive")
    limit = min(max_length, context)
    longer = [number for number, text in enumerate(texts) if len(text) > limit]
    if not longer:
        return texts
    longest = max(longer, key=lambda number: len(texts[number]))
    if not truncate:
        remedy = (
            f"raise max_length, up to {context}, or say truncate=True to cut them"
            if len(texts[longest]) <= context
            else f"this model reads {context} at most; split them, or say truncate=True to cut them"
        )
        raise InputError(
            f"{len(longer)} of {len(texts)} texts are longer than {limit} tokens, instruction "
            f"included; the longest, number {longest}, has {len(texts[longest])}: {remedy}"
        )
    cut = list(texts)
    for number in longer:
        text = texts[number]
        cut[number] = Text(text.tokens[:limit], text.mask[:limit])
        if not cut[number].mask.any():
            raise InputError(
                f"text {number}: nothing of it fits behind its instruction in {limit} tokens: "
                "raise max_length, or shorten the instruction"
            )
    warnings.warn(
        f"{len(longer)} of {len(texts)} texts were cut to {limit} tokens", UserWarning, stacklevel=3
    )
    return cut
