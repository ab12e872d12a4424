"""The text formats of GRIT (arXiv 2402.09906, figure 3).

To embed a text:

    <s><|user|>
    {instruction}
    <|embed|>
    {text}

To generate, with `</s>` after each turn of the assistant:

    <s><|user|>
    {user}
    <|assistant|>
    {assistant}</s>
    <|user|>
    ...

The markers in angle brackets and bars are ordinary text to the tokenizer. Only `<s>` and `</s>` are
special tokens; they are added as token ids, not as text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

USER = "<|user|>\n"
EMBED = "<|embed|>\n"
ASSISTANT = "<|assistant|>\n"
ROLES = ("system", "user", "assistant")


class ChatError(ValueError):
    """Messages are not a chat; the message says why."""


def strip_instruction(instruction: str) -> str:
    """Returns an instruction without the tabs, line breaks, spaces and colons around it."""
    return instruction.strip("\t\n :")


def embedding_prefix(instruction: str) -> str:
    """Returns the prompt that precedes a text to embed, without `<s>`.

    The instruction is stripped (`strip_instruction`), as in training.
    """
    instruction = strip_instruction(instruction)
    return f"{USER}{instruction}\n{EMBED}" if instruction else EMBED


def chat_prompt(user: str, *, is_first: bool) -> str:
    """Returns a user's turn and the assistant's marker, without `<s>`."""
    return f"{'' if is_first else chr(10)}{USER}{user}\n{ASSISTANT}"


def turns_of_messages(messages: Any) -> list[str]:
    """Returns the alternating turns of a chat: user, assistant, user, ...

    System messages are prepended to the user message that follows them, separated by an empty line.
    Empty ones are ignored.

    Args:
      messages: a list of `{"role": "system" | "user" | "assistant", "content": ...}`.

    Raises:
      ChatError: `messages` is not a list of messages, a role is unknown, user and assistant do not
        alternate, or a system message is not followed by a user message.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ChatError("'messages' is not a list")
    turns: list[str] = []
    system: list[str] = []
    for message in messages:
        role, content = _role_and_content(message)
        if role == "system":
            system += [content] if content.strip() else []
            continue
        if role != ("user", "assistant")[len(turns) % 2]:
            raise ChatError("user and assistant do not alternate, beginning with the user")
        if role == "user":
            content, system = "\n\n".join([*system, content]), []
        elif system:
            break
        turns.append(content)
    if system:
        raise ChatError("a system message is not followed by a user message")
    return turns


def chat_segments(messages: Any, *, add_generation_prompt: bool = True) -> list[str]:
    """Returns the text of a chat, split where the tokenizer's `</s>` belongs.

    `"</s>".join(segments)` is the prompt without `<s>`. `conversion/files/chat_template.jinja` is
    the same format for exported models.

    Args:
      messages: see `turns_of_messages`.
      add_generation_prompt: whether the prompt ends with the assistant's marker.

    Raises:
      ChatError: see `turns_of_messages`.
    """
    segments = [""]
    for index, turn in enumerate(turns_of_messages(messages)):
        if index % 2 == 0:
            prompt = chat_prompt(turn, is_first=index == 0)
            segments[-1] += prompt.removesuffix(ASSISTANT)
        else:
            segments[-1] += ASSISTANT + turn.strip()
            segments.append("")
    if add_generation_prompt:
        segments[-1] += ASSISTANT
    return segments


def _role_and_content(message: Any) -> tuple[str, str]:
    fields = message if isinstance(message, Mapping) else {}
    role, content = fields.get("role"), fields.get("content")
    if isinstance(role, str) and role not in ROLES:
        hint = "use 'system'" if role == "developer" else f"use {', '.join(map(repr, ROLES))}"
        raise ChatError(f"role {role!r} is unknown: {hint}")
    if fields.get("tool_calls") or fields.get("function_call"):
        raise ChatError("a message with tool calls, which are not supported")
    if isinstance(role, str) and isinstance(content, str):
        return role, content
    raise ChatError("a message whose role or content is not a string")
