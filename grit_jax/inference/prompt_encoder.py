"""Turns the strings, token ids, documents and chats that a user passes into checked token ids."""

from collections.abc import Iterable, Mapping, Sequence, Set
import functools
import re
from typing import Any
import warnings

from jaxtyping import Int
import numpy as np

from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.text.chat_template import ChatTemplate
from grit_jax.text.examples import Text
from grit_jax.text.templates import ChatError, chat_segments, turns_of_messages
from grit_jax.text.tokenizer import Tokenizer

# A text or a prompt: a string, or token ids.
TextLike = str | Sequence[int | np.integer] | np.ndarray

NO_IDS = np.zeros(0, np.int32)


class InputError(ValueError):
    """A text, prompt, document or chat is invalid; the message names it and says what to do."""


class PromptEncoder:
    """Tokenizes strings and checks token ids.

    Args:
      tokenizer: the model's tokenizer, or None if the model has none.
      vocab_size: size of the model's vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int):
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._has_warned = False

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          InputError: the model has no tokenizer.
        """
        if self._tokenizer is None:
            raise InputError(
                "this model has no tokenizer (tokenizer.model or tokenizer.json): pass "
                "tokenizer=PATH to from_pretrained, or give token ids"
            )
        return self._tokenizer

    def encode(
        self,
        text: TextLike,
        instruction: TextLike = "",
        *,
        add_bos: bool,
        add_eos: bool = False,
        name: str,
    ) -> Text:
        """Returns the token ids of an instruction followed by a text.

        The mask is False for the tokens of the instruction. Strings are tokenized together with
        their instruction; token ids are used as they are.

        Args:
          text: a string or token ids, not empty.
          instruction: precedes the text; may be empty.
          add_bos: whether to begin strings with `<s>`, if the tokenizer does. `<s>` belongs to the
            instruction if there is one.
          add_eos: whether to end strings with `</s>`, if the tokenizer does.
          name: name of the text in error messages.

        Raises:
          InputError: the text is empty, has no token, is not valid Unicode or has the wrong type;
            or a token id is outside of the vocabulary.
        """
        if isinstance(text, str):
            return self._encode_string(text, instruction, add_bos, add_eos, name)
        ids = self._check_ids(text, name)
        if not len(ids):
            raise InputError(f"{name} is empty: leave it out")
        if not isinstance(instruction, str):
            prefix = self._check_ids(instruction, "the instruction")
        elif instruction:
            prefix = self._tokenize(instruction, "the instruction")
            prefix = self._prepend_bos(prefix) if add_bos else prefix
        else:
            prefix = NO_IDS
        tokens = np.concatenate([prefix, ids])
        return Text(tokens, np.arange(len(tokens)) >= len(prefix))

    def encode_pair(
        self, prefix: str, text: str, *, add_bos: bool, add_eos: bool = False, name: str
    ) -> Text:
        """Returns the token ids of `prefix + text`; the mask is False for those of the prefix.

        A token with characters of both strings belongs to `text`.

        Args:
          prefix: may be empty.
          text: follows the prefix.
          add_bos, add_eos: see `encode`.
          name: name of `text` in error messages.

        Raises:
          InputError: a string is not valid Unicode.
        """
        prefix_ids = self._tokenize(prefix, "the instruction") if prefix else NO_IDS
        check_unicode(text, name)
        self._warn_of_control_tokens(prefix + text, name)
        ids, prefix_length = self.tokenizer.ids_after(prefix, prefix_ids, text)
        self._check_in_vocabulary(ids, name)
        begin = self.tokenizer.begin_ids if add_bos else NO_IDS
        end = self.tokenizer.end_ids if add_eos else NO_IDS
        ids = np.concatenate([begin, ids, end])
        prefix_length += len(begin) if prefix else 0
        return Text(ids, np.arange(len(ids)) >= prefix_length)

    def encode_chat(
        self, messages: Any, *, is_continuation: bool, name: str, answer_prefix: str = ""
    ) -> Int[np.ndarray, " tokens"]:
        """Returns the prompt after which the assistant answers a chat's last message.

        It is in the chat template of the tokenizer or, without one, in GRIT's.

        Args:
          messages: see `text.templates.turns_of_messages`; the last message is the user's.
          is_continuation: whether the prompt follows other tokens: it begins without `<s>`, in
            GRIT's format with a line break.
          name: name of the chat in error messages.
          answer_prefix: the words that the answer begins with.

        Raises:
          InputError: `messages` is not a chat, ends with another role, or a turn is empty.
        """
        try:
            turns_of_messages(messages)
        except ChatError as error:
            raise InputError(
                f"{name}: {error}: give a list of {{'role': 'system', 'user' or 'assistant', "
                "'content': a string}, in which user and assistant alternate, user first"
            ) from None
        if not len(messages):
            raise InputError(f"{name} has no messages: give at least one message of the user")
        if messages[-1]["role"] != "user":
            raise InputError(
                f"{name} ends with a message of the assistant: the last message must be the "
                "user's, so remove it or add a message of the user"
            )
        for index, message in enumerate(messages):
            if message["role"] != "system" and not message["content"].strip():
                raise InputError(f"{name}: message {index} is empty: leave it out")
        if self.chat_template is not None:
            tokens = self._encode_in_template(self.chat_template, messages, answer_prefix, name)
            has_bos = tokens[:1].tolist() == [self.tokenizer.bos_id]
            return tokens[1:] if is_continuation and has_bos else tokens
        segments = chat_segments(messages)
        if is_continuation:
            segments[0] = f"\n{segments[0]}"
        segments[-1] += answer_prefix
        eos = np.array([self.tokenizer.eos_id], np.int32)
        ids = [self._tokenize(segments[0], name)]
        for segment in segments[1:]:
            ids += [eos, self._tokenize(segment, name)]
        tokens = np.concatenate(ids)
        return tokens if is_continuation else self._prepend_bos(tokens)

    @functools.cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template of the tokenizer, None for GRIT's.

        Raises:
          TokenizerError: the template is not valid.
        """
        source = self.tokenizer.chat_template
        return ChatTemplate(source, self.tokenizer) if source else None

    def _encode_in_template(
        self, template: ChatTemplate, messages: Any, answer_prefix: str, name: str
    ) -> Int[np.ndarray, " tokens"]:
        for text in (*(message["content"] for message in messages), answer_prefix):
            check_unicode(text, name)
        try:
            tokens = template.prompt(messages, answer_prefix)
        except ChatError as error:
            raise InputError(f"{name}: {error}") from None
        self._check_in_vocabulary(tokens, name)
        return tokens

    def num_end_tokens(self, text: TextLike) -> int:
        """Returns how many tokens `encode` with `add_eos` puts after a text: none after ids."""
        return len(self.tokenizer.end_ids) if isinstance(text, str) else 0

    def _encode_string(
        self, text: str, instruction: TextLike, add_bos: bool, add_eos: bool, name: str
    ) -> Text:
        if not text.strip():
            raise InputError(f"{name} is empty: leave it out")
        if not isinstance(instruction, str):
            self._check_ids(instruction, "the instruction")
            raise InputError(f"the instruction is token ids, so {name} must be token ids too")
        encoded = self.encode_pair(instruction, text, add_bos=add_bos, add_eos=add_eos, name=name)
        num_added = len(self.tokenizer.begin_ids) if add_bos and not instruction else 0
        num_added += len(self.tokenizer.end_ids) if add_eos else 0
        if encoded.mask.sum() == num_added:  # A tokenizer may drop characters.
            raise InputError(f"{name} has only characters that the tokenizer drops: leave it out")
        return encoded

    def _tokenize(self, text: str, name: str) -> Int[np.ndarray, " tokens"]:
        check_unicode(text, name)
        ids = self.tokenizer.ids(text)
        self._check_in_vocabulary(ids, name)
        return ids

    def _prepend_bos(self, ids: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens_with_bos"]:
        return np.concatenate([self.tokenizer.begin_ids, ids])

    def _warn_of_control_tokens(self, text: str, name: str) -> None:
        """Warns once if a string has tokens such as `</s>`, which are read as letters."""
        if self._has_warned or not (found := self._control_tokens.findall(text)):
            return
        self._has_warned = True
        warnings.warn(
            f"{name} contains {', '.join(dict.fromkeys(found))}, which is read as ordinary text, "
            "not as a control token: remove it, pass the messages of a chat to `chat`, or give "
            "token ids",
            UserWarning,
            stacklevel=2,
        )

    @functools.cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        """Matches the tokens that a text cannot have, except the unknown token."""
        unknown = self.tokenizer.special_tokens.get("unk_token")
        others = {token for token in self.tokenizer.control_tokens if token != unknown}
        return re.compile("|".join(map(re.escape, sorted(others, key=len, reverse=True))))

    def _check_in_vocabulary(self, ids: Int[np.ndarray, " tokens"], name: str) -> None:
        """Checks that the model has the tokens; some are only added to the tokenizer."""
        if self.tokenizer.vocab_size <= self._vocab_size or not len(ids):
            return
        if (largest := int(ids.max())) >= self._vocab_size:
            raise InputError(
                f"{name} has the token {self.tokenizer.decode([largest])!r} with the id {largest}, "
                f"but the ids of this model are 0 to {self._vocab_size - 1}: remove it"
            )

    def _check_ids(self, ids: Any, name: str) -> Int[np.ndarray, " tokens"]:
        try:
            array = np.asarray(ids)
        except ValueError:  # Lists of unequal lengths.
            array = np.zeros((0, 0))
        if array.size == 0 and array.ndim == 1:
            return NO_IDS
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise InputError(
                f"{name} is {_describe(ids)}: it must be a string, or one list of token ids"
            )
        if array.min() < 0 or array.max() >= self._vocab_size:
            wrong = array.min() if array.min() < 0 else array.max()
            raise InputError(
                f"{name} has the token id {wrong}, but the ids of this model are 0 to "
                f"{self._vocab_size - 1}"
            )
        return array.astype(np.int32)


def check_unicode(text: str, name: str) -> None:
    """Checks that a string can be encoded as UTF-8, as tokenizers require.

    Args:
      text: the string.
      name: its name in the error message.

    Raises:
      InputError: the string has half of a surrogate pair, such as JSON's "\\ud83d".
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} has half of a surrogate pair at character {error.start}: correct the text"
        ) from None


def as_list(values: Any, name: str) -> list[Any]:
    """Returns a list of the values in a list, an array, a column of a table or an iterator.

    Args:
      values: the values, in an order.
      name: their name in the error messages, a plural.

    Raises:
      InputError: `values` is a single value, a set or a dictionary, or there are none.
    """
    array = np.asarray(values) if hasattr(values, "__array__") else None
    is_single = isinstance(values, str | bytes | bytearray) or (
        array.ndim == 0 if array is not None else not isinstance(values, Iterable)
    )
    if is_single or isinstance(values, Mapping | Set):
        raise InputError(f"{name} are {_describe(values)}: give a list of strings")
    listed = list(values if array is None else array)
    if not listed:
        raise InputError(f"no {name} were given: give at least one")
    return listed


def as_text_list(texts: Any) -> tuple[list[TextLike], bool]:
    """Returns a list of texts, and whether a single one was passed: a string or token ids.

    Raises:
      InputError: there are no texts, or `texts` is not a list (see `as_list`).
    """
    if isinstance(texts, str):
        return [texts], True
    listed = as_list(texts, "texts")
    _refuse_dictionaries(listed)
    if isinstance(listed[0], int | np.integer):
        return [listed], True
    return listed, False


def _refuse_dictionaries(texts: Sequence[Any]) -> None:
    first = texts[0][0] if isinstance(texts[0], list | tuple) and texts[0] else texts[0]
    if isinstance(first, Mapping):
        method = "`chat` or `stream_chat`" if "role" in first else "`encode_document`"
        raise InputError(
            f"texts are dictionaries with {', '.join(map(repr, first))}: pass them to {method}, "
            "or give strings"
        )


def check_count(name: str, value: Any, smallest: int = 1, largest: int | None = None) -> None:
    """Checks that an argument is an integer in a range.

    Raises:
      InputError: it is not.
    """
    is_integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_integer or value < smallest or (largest is not None and value > largest):
        valid = f"of at least {smallest}" if largest is None else f"from {smallest} to {largest}"
        raise InputError(f"{name}={value!r} must be an integer {valid}")


def as_chat_list(messages: Any) -> tuple[list[Any], bool]:
    """Returns a list of chats, and whether a single one was passed.

    Raises:
      InputError: there are no messages.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(
            "messages must be a list of {'role': ..., 'content': ...}, or a list of such lists"
        )
    if isinstance(messages[0], Mapping):
        return [messages], True
    return list(messages), False


def as_stop_strings(stop: str | Sequence[str] | None) -> list[str]:
    """Returns the strings at which generated text ends, as a list.

    Raises:
      InputError: a string is empty or has another type.
    """
    if stop is None or isinstance(stop, str):
        strings = [] if stop is None else [stop]
    else:
        strings = list(stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            problem = "empty" if string == "" else _describe(string)
            raise InputError(f"a stop string is {problem}: give strings that are not empty")
    return strings


def prompt_of_instruction(instruction: Any, spec: EmbeddingSpec) -> str:
    """Returns what precedes a text with an instruction in plain words.

    Raises:
      InputError: it is not a string, or has the markers already.
    """
    if not isinstance(instruction, str):
        raise InputError(f"instruction is {_describe(instruction)}: give a string")
    try:
        return spec.prompt(instruction)
    except ValueError as error:
        raise InputError(str(error)) from None


def document_texts(corpus: Any) -> Any:
    """Returns the text to embed of each document; texts are returned unchanged.

    Args:
      corpus: a document `{"title": ..., "text": ...}`, a list of documents, or texts.

    Raises:
      InputError: a document has no text.
    """
    if isinstance(corpus, Mapping):
        return document_text(corpus, "document 0")
    if isinstance(corpus, str):
        return corpus
    documents = as_list(corpus, "documents")
    if isinstance(documents[0], Mapping):
        return [document_text(document, f"document {i}") for i, document in enumerate(documents)]
    return documents


def document_text(document: Any, name: str) -> str:
    """Returns the text to embed of a document: its title, if it has one, a space and its text.

    Raises:
      InputError: the document has no text; the message begins with `name`.
    """
    return " ".join(part for part in title_and_text(document, name) if part)


def title_and_text(document: Any, name: str) -> tuple[str, str]:
    """Returns the title and the text of a document; a missing title is "".

    Raises:
      InputError: the document has no text; the message begins with `name`.
    """
    if not isinstance(document, Mapping) or not isinstance(document.get("text"), str):
        raise InputError(f"{name} has no string 'text': give an object with 'text'")
    title = document.get("title") or ""
    if not isinstance(title, str):
        raise InputError(f"{name}: 'title' is not a string: correct it, or leave it out")
    return title, document["text"]


def fit_to_length(
    texts: Sequence[Text],
    max_length: int,
    context_length: int,
    *,
    num_end_tokens: Sequence[int],
    truncate: bool,
) -> list[Text]:
    """Returns texts of at most `max_length` tokens; longer ones are truncated if asked for.

    Args:
      texts: texts with their instructions.
      max_length: maximum tokens of a text.
      context_length: maximum tokens that the model supports.
      num_end_tokens: how many tokens of each text end it, and are kept, as transformers keeps them.
      truncate: whether to truncate longer texts, with a warning.

    Raises:
      InputError: a text is longer and `truncate` is False, or only the instruction would be left.
    """
    check_count("max_length", max_length)
    limit = min(max_length, context_length)
    longer = [index for index, text in enumerate(texts) if len(text) > limit]
    if not longer:
        return list(texts)
    longest = max(longer, key=lambda index: len(texts[index]))
    if not truncate:
        remedy = (
            f"raise max_length, up to {context_length}, or pass truncate=True"
            if len(texts[longest]) <= context_length
            else f"this model supports {context_length}; split the texts, or pass truncate=True"
        )
        raise InputError(
            f"{len(longer)} of {len(texts)} texts are longer than {limit} tokens, instruction "
            f"included; the longest, number {longest}, has {len(texts[longest])}: {remedy}"
        )
    truncated = list(texts)
    for index in longer:
        text, num_end = texts[index], num_end_tokens[index]
        kept = np.r_[: max(limit - num_end, 0), len(text) - num_end : len(text)]
        truncated[index] = Text(text.tokens[kept], text.mask[kept])
        if text.mask[kept].sum() <= num_end:
            raise InputError(
                f"text {index}: its instruction alone takes all {limit} tokens: raise max_length, "
                "or shorten the instruction"
            )
    warnings.warn(
        f"{len(longer)} of {len(texts)} texts were truncated to {limit} tokens",
        UserWarning,
        stacklevel=3,
    )
    return truncated


def _describe(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
