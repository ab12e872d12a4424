"""Chat templates of other models, in Jinja, and which tokens of a chat are the assistant's.

The strings of messages are text: a control token such as `<|im_end|>` in them stays text, and only
the template writes control tokens. While a template is rendered, `MARK` stands on both sides of
what must be told apart from its own text: the control tokens in messages, which are numbered, and
the beginning and end of `{% generation %}` blocks.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import datetime
import functools
import json
import re
from typing import Any, ClassVar

from jaxtyping import Bool, Int
import jinja2
from jinja2 import ext, nodes, sandbox
import numpy as np

from grit_jax.text.templates import ChatError
from grit_jax.text.tokenizer import Tokenizer, TokenizerError

# A private-use character, which no message may have.
MARK = "\U0010fffd"
BEGIN, END = f"{MARK}begin{MARK}", f"{MARK}end{MARK}"
# An answer that no template has in its own text.
PROBE = f"{MARK}probe{MARK}"


@dataclasses.dataclass(frozen=True)
class RenderedChat:
    """A chat in which control tokens have names that no text has (`ChatTemplate`).

    Attributes:
      text: the chat.
      spans: begin and end of each `{% generation %}` block, in characters.
    """

    text: str
    spans: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class ChatTokens:
    """The tokens of a chat to train on.

    Attributes:
      tokens: token ids.
      mask: the tokens that are predicted: of the assistant's answers, with those that end them.
      num_rewritten: number of answers that are not predicted, because the template shows them in
        another form once messages follow.
    """

    tokens: Int[np.ndarray, " tokens"]
    mask: Bool[np.ndarray, " tokens"]
    num_rewritten: int


class ChatTemplate:
    """A chat template with a tokenizer. It is rendered in a sandbox, as in transformers.

    Args:
      source: the template, in Jinja.
      tokenizer: the tokenizer of the same model.

    Raises:
      TokenizerError: the template is not valid, or the tokenizer cannot be used with one.
    """

    def __init__(self, source: str, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TokenizerError(
                f"the chat template of {tokenizer.name or 'the tokenizer'} is not valid: {error}"
            ) from None
        unknown = tokenizer.special_tokens.get("unk_token")
        control = [token for token in tokenizer.control_tokens if token != unknown]
        self._names = {token: f"{MARK}{i}{MARK}" for i, token in enumerate(control)}
        self._tokens = {name: token for token, name in self._names.items()}
        longest_first = sorted(control, key=len, reverse=True)
        any_control = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._control_token = re.compile(any_control)
        self._marked_or_control = re.compile(f"{MARK}\\w+{MARK}|{any_control}")
        self._encode = tokenizer.with_renamed_tokens(self._names)

    def text(self, messages: Sequence[Mapping[str, Any]], *, is_open: bool) -> str:
        """Returns a chat as text in which control tokens are strings.

        Args:
          messages: the messages of the chat.
          is_open: whether the text ends where the assistant's answer begins or, if the last message
            is the assistant's, where it goes on.

        Raises:
          ChatError: the template refuses the messages.
        """
        if not is_open or messages[-1]["role"] != "assistant":
            named = self._render(messages, is_prompt=is_open).text
        else:
            prompt = self._prompt(messages[:-1])
            answer = self._answer(prompt, self._render(messages).text)
            if answer is None:
                raise ChatError("the chat template rewrites the answer, or what precedes it")
            named = prompt + answer[0]
        return re.sub(f"{MARK}\\d+{MARK}", lambda match: self._tokens[match[0]], named)

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], answer_prefix: str = ""
    ) -> Int[np.ndarray, " tokens"]:
        """Returns the token ids after which the assistant answers the last message.

        Args:
          messages: the messages of the chat.
          answer_prefix: the words that the answer begins with.

        Raises:
          ChatError: the template refuses the messages.
        """
        ids, _ = self._encode(self._prompt(messages) + answer_prefix)
        return np.array(ids, np.int32)

    def example(self, messages: Sequence[Mapping[str, Any]]) -> ChatTokens:
        """Returns the tokens of a chat to train on.

        The answers are the template's `{% generation %}` blocks, if it has them. Otherwise an
        answer begins where the prompt for it ends, and ends with the token that ends a turn. An
        answer before the last is predicted only if it and its prompt have the form of a last one:
        that is what the model gets and generates.

        Args:
          messages: the messages of the chat; the last is the assistant's.

        Raises:
          ChatError: the template refuses the messages, or the last answer cannot be found.
        """
        chat = self._render(messages)
        spans, num_rewritten = chat.spans, 0
        if not spans:
            found = [
                self._span(messages, index, chat.text)
                for index, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
            if found[-1] is None:
                raise ChatError(
                    "the chat template rewrites the last answer or what precedes it, so that it is "
                    "not what the model generates after a prompt"
                )
            spans = [span for span in found if span is not None]
            num_rewritten = len(found) - len(spans)
        ids, offsets = self._encode(chat.text)
        first, last = np.array(offsets, np.int64).reshape(-1, 2).T
        mask = np.zeros(len(ids), bool)
        for start, end in spans:
            mask |= (first < end) & (last > start)
        return ChatTokens(np.array(ids, np.int32), mask, num_rewritten)

    @functools.cached_property
    def end_ids(self) -> list[int]:
        """The ids of the tokens that end an answer; empty if the template shows none."""
        return [self._tokenizer.control_tokens[self._tokens[name]] for name in self._end_names]

    @property
    def vocab_size(self) -> int:
        """Number of ids that a chat may have."""
        question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        ids, _ = self._encode(self._render([question, answer]).text)
        return max(self._tokenizer.vocab_size, 1 + max(ids))

    def _prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        return self._render(messages, is_prompt=True).text

    def _span(
        self, messages: Sequence[Mapping[str, Any]], index: int, chat: str
    ) -> tuple[int, int] | None:
        """Returns where an answer is in a chat, or None if it is not what is generated there.

        Raises:
          ChatError: the template refuses the messages, or ends the answer with no special token.
        """
        prompt = self._prompt(messages[:index])
        found = self._answer(prompt, chat)
        as_last = self._answer(prompt, self._render(messages[: index + 1]).text)
        if found is None or as_last is None or found[0] != as_last[0]:
            return None
        is_whole = _without_spaces(messages[index]["content"]) in _without_spaces(found[0])
        return (len(prompt), found[1]) if is_whole else None

    def _answer(self, prompt: str, chat: str) -> tuple[str, int] | None:
        """Returns the answer that follows a prompt in a chat, and where the token after it ends.

        The result is None if the chat does not begin with the prompt.
        """
        if not chat.startswith(prompt):
            return None
        end = self._end.search(chat, len(prompt))
        if end is None:
            raise ChatError("the chat template ends an answer with no special token")
        return chat[len(prompt) : end.start()], end.end()

    @functools.cached_property
    def _end(self) -> re.Pattern[str]:
        return re.compile("|".join(self._end_names) or "(?!)")

    @functools.cached_property
    def _end_names(self) -> list[str]:
        """The names of the tokens that end an answer: the first ones after it."""
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}
        ends: dict[str, None] = {}
        for messages in ([question, answer], [question, answer, question]):
            with contextlib.suppress(ChatError):
                text = self._named(self._rendered(messages)).text
                found = re.search(f"{PROBE}.*?({MARK}\\d+{MARK})", text, re.DOTALL)
                ends |= {} if found is None else {found[1]: None}
        return list(ends)

    def _render(
        self, messages: Sequence[Mapping[str, Any]], *, is_prompt: bool = False
    ) -> RenderedChat:
        protected = [self._protected(message) for message in messages]
        return self._named(self._rendered(protected, is_prompt=is_prompt))

    def _rendered(self, messages: Sequence[Mapping[str, Any]], *, is_prompt: bool = False) -> str:
        try:
            return self._template.render(
                **self._tokenizer.special_tokens,
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=is_prompt,
            )
        except jinja2.TemplateError as error:
            raise ChatError(f"the chat template refuses the messages: {error}") from None
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise ChatError(f"the chat template fails: {error!r}") from None

    def _protected(self, value: Any) -> Any:
        """Returns a message in which control tokens are replaced by their names."""
        if isinstance(value, str):
            if MARK in value:
                raise ChatError(f"a message has the private character U+{ord(MARK):X}: remove it")
            return self._control_token.sub(lambda match: self._names[match[0]], value)
        if isinstance(value, Mapping):
            return {key: self._protected(v) for key, v in value.items() if v is not None}
        return [*map(self._protected, value)] if isinstance(value, list | tuple) else value

    def _named(self, rendered: str) -> RenderedChat:
        """Returns a chat in which the template's control tokens are names, and only these."""
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        length = start = position = 0
        for match in self._marked_or_control.finditer(rendered):
            found, before = match[0], rendered[position : match.start()]
            position, length = match.end(), length + len(before)
            part = self._tokens.get(found) or self._names.get(found, found)
            if found == BEGIN:
                part, start = "", length
            elif found == END:
                part, spans = "", [*spans, (start, length)]
            parts += [before, part]
            length += len(part)
        return RenderedChat("".join([*parts, rendered[position:]]), spans)


@functools.lru_cache(maxsize=8)
def chat_template(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    """Returns `ChatTemplate(source, tokenizer)`, which is made once."""
    return ChatTemplate(source, tokenizer)


class _GenerationBlocks(ext.Extension):
    """Puts `BEGIN` and `END` around what is in `{% generation %}` blocks."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (BEGIN, END))
        return nodes.Scope([begin, *body, end]).set_lineno(line)


@functools.cache
def _environment() -> sandbox.ImmutableSandboxedEnvironment:
    """Returns the environment of templates: the functions and filters that transformers has."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _time_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _time_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _without_spaces(text: str) -> str:
    return "".join(text.split())
