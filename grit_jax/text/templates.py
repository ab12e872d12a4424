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

A model may also be trained with other formats: chats in the chat template of its base model (see
`chat_template`), and texts to embed in a format such as "Instruct: {instruction}\\nQuery: {text}",
in which a text without an instruction stands alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
import re
import string
from typing import Any

USER = "<|user|>\n"
EMBED = "<|embed|>\n"
ASSISTANT = "<|assistant|>\n"
ROLES = ("system", "user", "assistant")
# Names of templates: GRIT's; the chat template of the base model; and for texts to embed the format
# of E5-Mistral and Qwen3-Embedding.
GRIT, BASE, INSTRUCT = "grit", "base", "instruct"
INSTRUCT_FORMAT = "Instruct: {instruction}\nQuery: {text}"
# The chat format of GRIT in Jinja, for exported models.
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


class ChatError(ValueError):
    """Messages are not a chat; the message says why."""


def strip_instruction(instruction: str, template: str = GRIT) -> str:
    """Returns an instruction without the spaces around it, and without colons in GRIT's template.

    Args:
      instruction: the instruction.
      template: see `embedding_template`.
    """
    return instruction.strip("\t\n :") if template == GRIT else instruction.strip()


def embedding_prefix(instruction: str, template: str = GRIT) -> str:
    """Returns the prompt that precedes a text to embed, without `<s>`.

    The instruction is stripped (`strip_instruction`), as in training.

    Args:
      instruction: the instruction; may be empty.
      template: see `embedding_template`.
    """
    instruction = strip_instruction(instruction, template)
    if template != GRIT:
        return template.format(instruction=instruction, text="") if instruction else ""
    return f"{USER}{instruction}\n{EMBED}" if instruction else EMBED


def embedding_template(name: str) -> str:
    """Returns the template of texts to embed with a name.

    Args:
      name: "grit", "instruct", or a format with {instruction} and, at its end, {text}.

    Returns:
      "grit" or a format.

    Raises:
      ValueError: the format is not valid.
    """
    template = INSTRUCT_FORMAT if name == INSTRUCT else name
    if template == GRIT:
        return template
    try:
        fields = [field[1:] for field in string.Formatter().parse(template) if field[1] is not None]
    except ValueError:  # A brace is not closed.
        fields = []
    if fields != [("instruction", "", None), ("text", "", None)] or template[-6:] != "{text}":
        raise ValueError(
            f"{name!r} must be {GRIT!r}, {INSTRUCT!r} or a format that has {{instruction}} and "
            f"ends with {{text}}, such as {INSTRUCT_FORMAT!r}"
        )
    return template


def template_of_prompt(prompt: str) -> str | None:
    """Returns the template of a prompt such as "Instruct: Find it.\\nQuery:", None for others."""
    found = re.fullmatch("Instruct: .*\nQuery:( ?)", prompt, re.DOTALL)
    return None if found is None else INSTRUCT_FORMAT.replace(" {text}", f"{found[1]}{{text}}")


def has_markers(instruction: str, template: str = GRIT) -> bool:
    """Returns whether an instruction has the markers of a template, which are added to it.

    Args:
      instruction: what should be an instruction in plain words.
      template: see `embedding_template`.
    """
    if template == GRIT:
        return EMBED.strip() in instruction
    before, after = template.format(instruction="\0", text="").split("\0")
    stripped = instruction.strip()
    return stripped.startswith(before) and stripped.endswith(after.strip()) and before + after != ""


def exported_chat_template(*, adds_bos: bool) -> str:
    """Returns the chat format of GRIT in Jinja, with BOS or without."""
    source = CHAT_TEMPLATE.read_text(encoding="utf-8")
    return source if adds_bos else source.removeprefix("{{- bos_token -}}\n")


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

    `"</s>".join(segments)` is the prompt without `<s>`. `chat_template.jinja` is the same format
    for exported models.

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
