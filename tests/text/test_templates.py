"""The text formats: chats, and the template that exported models render them with."""

import functools

from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
import pytest

from grit_jax.text.examples import chat_text
from grit_jax.text.templates import (
    CHAT_TEMPLATE,
    ChatError,
    chat_segments,
    turns_of_messages,
)
from grit_jax.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer()
TEXTS = st.text(alphabet="ab \n\t:{}é日🙂<|>\u3000", max_size=12)


def message(role, content):
    return {"role": role, "content": content}


@st.composite
def conversations(draw):
    """User and assistant usually alternate; system messages are anywhere."""
    messages = []
    for number in range(draw(st.integers(0, 6))):
        messages += [message("system", text) for text in draw(st.lists(TEXTS, max_size=2))]
        alternating = ("user", "assistant")[number % 2]
        role = draw(st.sampled_from([alternating, alternating, "user", "assistant"]))
        messages.append(message(role, draw(TEXTS)))
    return messages + [message("system", text) for text in draw(st.lists(TEXTS, max_size=1))]


def raise_exception(text):
    raise TemplateError(text)


@functools.cache
def exported_template():
    """The template in an environment with the settings of transformers."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(CHAT_TEMPLATE.read_text(encoding="utf-8"))


def rendered(messages, add_generation_prompt):
    return exported_template().render(
        messages=messages,
        bos_token="<s>",
        eos_token="</s>",
        add_generation_prompt=add_generation_prompt,
    )


@given(messages=conversations(), add_generation_prompt=st.booleans())
@example([message("user", " Hi "), message("assistant", " Hello.\n")], True)
@example([message("user", "a"), message("system", "b"), message("assistant", "c")], False)
@example([message("assistant", "a"), message("user", "b")], True)
@example([message("user", "a"), message("user", "b")], True)
@example([message("system", " \n"), message("user", "a")], True)
def test_exported_models_render_the_same_chat(messages, add_generation_prompt):
    try:
        segments = chat_segments(messages, add_generation_prompt=add_generation_prompt)
    except ChatError as error:
        with pytest.raises(TemplateError, match=str(error)):
            rendered(messages, add_generation_prompt)
        return
    assert rendered(messages, add_generation_prompt) == "<s>" + "</s>".join(segments)


words = st.text(alphabet="ab \n.é日", min_size=1, max_size=12).filter(str.strip)


@given(texts=st.lists(words, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_segments_have_the_tokens_of_training(texts):
    roles = ("user", "assistant") * 3
    messages = [message(role, text) for role, text in zip(roles, texts, strict=False)]
    segments = chat_segments(messages, add_generation_prompt=False)
    ids = [TOKENIZER.bos_id]
    for segment in segments[:-1]:
        ids += [*TOKENIZER.encode(segment), TOKENIZER.eos_id]
    assert segments[-1] == ""
    assert chat_text(TOKENIZER, turns_of_messages(messages), 10_000).tokens.tolist() == ids


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("text", "not a list"),
        (None, "not a list"),
        (["text"], "role or content is not a string"),
        ([message("user", None)], "role or content is not a string"),
        ([message("assistant", "a")], "do not alternate"),
        ([message("user", "a")] * 2, "do not alternate"),
        ([message("tool", "a")], "role 'tool' is unknown"),
        ([message("user", "a"), message("system", "b")], "not followed by a user message"),
        (
            [message("user", "a"), message("system", "b"), message("assistant", "c")],
            "not followed by a user message",
        ),
    ],
)
def test_messages_that_are_not_a_chat_are_refused(messages, reason):
    with pytest.raises(ChatError, match=reason):
        turns_of_messages(messages)
