"""Chats in the chat template of a base model have the ids and masks that transformers gives."""

import functools
import os
from pathlib import Path
import re
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
from tokenizer_files import BEGIN, END, OTHER, write_sentencepiece, write_tokenizer

from grit_jax.inference.prompt_encoder import InputError, PromptEncoder
from grit_jax.text.chat_template import MARK, ChatTemplate
from grit_jax.text.examples import RejectedExample, TextOptions, chat_example
from grit_jax.text.kinds import TEXT_KINDS
from grit_jax.text.templates import ChatError
from grit_jax.text.tokenizer import Tokenizer, TokenizerError

LOOP, ASK = "{% for m in messages %}", "{% if add_generation_prompt %}"
# What the assistant says, and what others say; A and Z are the tokens that begin and end a turn.
SAID = "{% if m.role == 'assistant' %}{% generation %}ANSWER{% endgeneration %}{% else %}TEXT"
SAID += "{% endif %}"


def template(header, said, between, prompt, before="", answer=None):
    turn = SAID.replace("ANSWER", answer or said).replace("TEXT", said)
    text = f"{before}{LOOP}{header}{turn}{between}{{% endfor %}}{ASK}{prompt}{{% endif %}}"
    return text.replace("A!", BEGIN).replace("Z!", END).replace("O!", OTHER)


# The forms of published templates.
FORMS = {
    "chatml": template(
        "{{ 'A!' + m.role + '\n' }}",
        "{{ m.content + 'Z!' }}",
        "{{ '\n' }}",
        "{{ 'A!assistant\n' }}",
        "{% if messages[0].role != 'system' %}{{ 'A!system\nBe kind.Z!\n' }}{% endif %}",
    ),
    "llama3": template(
        "{{ 'A!' + m.role + 'O!\n\n' }}",
        "{{ m.content | trim + 'Z!' }}",
        "",
        "{{ 'A!assistantO!\n\n' }}",
        "{{ bos_token }}",
    ),
    "gemma": template(
        "{{ 'A!' + ('model' if m.role == 'assistant' else m.role) + '\n' }}",
        "{{ m.content | trim }}Z!",
        "{{ '\n' }}",
        "{{ 'A!model\n' }}",
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}",
    ),
    "mistral": template(
        "",
        "{{ '[INST] ' + m.content + ' [/INST]' }}",
        "",
        "",
        "{{ bos_token }}",
        answer="{{ m.content + eos_token }}",
    ),
}
SENTENCEPIECE = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True}
SENTENCEPIECE |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
BLOCK = re.compile(r"{% (end)?generation %}")
CONTENT = st.text(
    st.one_of(st.sampled_from("ab \n\t.'1é日🙂\u0301<|>"), st.characters(codec="utf-8")),
    min_size=1,
    max_size=20,
).filter(lambda text: MARK not in text and text.strip())
CHATS = st.lists(CONTENT, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0)


def messages_of(texts, system=""):
    roles = ("user", "assistant") * len(texts)
    said = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *said] if system else said


@functools.cache
def tokenizers(style):
    """Returns our tokenizer, and that of transformers for the same files."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        write = write_sentencepiece if style == "sentencepiece" else write_tokenizer
        options = SENTENCEPIECE if style == "sentencepiece" else {"style": style}
        own = Tokenizer(write(Path(folder), **options))
        path = Path(folder, "tokenizer.json")
        path.write_bytes(own.exported())
        return own, PreTrainedTokenizerFast(tokenizer_file=str(path), **own.special_tokens)


@functools.cache
def templates(style, form):
    """Returns a template with `{% generation %}` blocks and without, as ours, and as text."""
    source = FORMS[form]
    plain = BLOCK.sub("", source)
    own = tokenizers(style)[0]
    return ChatTemplate(source, own), ChatTemplate(plain, own), source


STYLES_AND_FORMS = [
    ("gpt2", "chatml"),
    ("llama3", "llama3"),
    ("qwen", "chatml"),
    ("gemma", "gemma"),
    ("metaspace", "mistral"),
    ("sentencepiece", "mistral"),
]


@pytest.mark.parametrize(("style", "form"), STYLES_AND_FORMS)
def test_tokens_and_masks_are_those_of_transformers(style, form):
    own, theirs = tokenizers(style)
    marked, plain, source = templates(style, form)

    @settings(deadline=None, max_examples=30)
    @given(CHATS, st.sampled_from(["", "Be brief."]))
    def check(texts, system):
        messages = messages_of(texts, "" if form == "gemma" else system)
        expected = theirs.apply_chat_template(
            messages, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
        )
        for each in (marked, plain):
            chat = each.example(messages)
            assert chat.tokens.tolist() == expected["input_ids"]
            assert chat.mask.astype(int).tolist() == expected["assistant_masks"]
            assert chat.num_rewritten == 0
        prompt = theirs.apply_chat_template(
            messages[:-1], chat_template=source, add_generation_prompt=True
        )
        assert plain.prompt(messages[:-1]).tolist() == prompt["input_ids"]
        shown = theirs.apply_chat_template(
            messages[:-1], chat_template=source, add_generation_prompt=True, tokenize=False
        )
        assert plain.text(messages[:-1], is_open=True) == shown
        assert own.encode_markup(shown) == prompt["input_ids"]

    check()
    ends = [own.eos_id]
    assert plain.end_ids == ends and plain.vocab_size >= own.vocab_size


@pytest.mark.parametrize(("style", "form"), STYLES_AND_FORMS)
def test_control_tokens_in_a_message_are_text(style, form):
    own, _ = tokenizers(style)
    _, plain, _ = templates(style, form)
    control = set(own.control_tokens.values())

    @settings(deadline=None, max_examples=10)
    @given(st.lists(st.sampled_from([*own.control_tokens, "a", " ", "\n"]), max_size=6))
    def check(parts):
        text = f"x{''.join(parts)}x"
        ours, harmless = (plain.example(messages_of([t, t, t, t])) for t in (text, "x"))
        found = [[i for i in chat.tokens.tolist() if i in control] for chat in (ours, harmless)]
        assert found[0] == found[1]
        answers = [own.decode(ours.tokens[ours.mask].tolist())]
        assert answers[0].replace(" ", "") == 2 * text.replace(" ", "")
        end = ours.tokens[ours.mask].tolist().count(own.eos_id)
        assert end == 2

    check()


# Like Qwen3: earlier answers lose what the model thought, and the last has it or none.
THOUGHT = "<think>\n\n</think>\n\n"
REWRITING = template(
    "{{ 'A!' + m.role + '\n' }}",
    "{% if m.role == 'assistant' %}{% if loop.last %}{% if '</think>' not in m.content %}"
    f"{{{{ '{THOUGHT}' }}}}{{% endif %}}{{{{ m.content }}}}{{% else %}}"
    "{{ m.content.split('</think>')[-1].strip() }}{% endif %}{% else %}{{ m.content }}{% endif %}"
    "{{ 'Z!' }}",
    "{{ '\n' }}",
    "{{ 'A!assistant\n' }}",
)


def test_earlier_answers_that_a_template_rewrites_are_not_trained_on():
    own, _ = tokenizers("llama3")
    source = BLOCK.sub("", REWRITING)
    thoughts = [f"<think>\nhm {n}\n</think>\n\n" for n in range(2)]
    for before in (thoughts, ["", ""]):
        texts = ["Who?", f"{before[0]}I.", "Why?", f"{before[1]}Because."]
        raw = TEXT_KINDS["generative"].to_canonical({"text": texts})
        chat = chat_example(own, raw, TextOptions(chat_template=source)).chat
        predicted = own.decode(chat.tokens[chat.mask].tolist())
        assert predicted == f"{before[1] or THOUGHT}Because."
        assert "rewrites earlier answers" in chat.note
        shown = own.decode(chat.tokens.tolist())
        assert "assistant\nI.\nuser" in shown.replace(END, "")
        single = chat_example(own, {"text": texts[:2]}, TextOptions(chat_template=source)).chat
        assert own.decode(single.tokens[single.mask].tolist()) == f"{before[0] or THOUGHT}I."
        assert single.note == ""


@pytest.mark.parametrize(
    ("source", "texts", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ["a", "b"], "no special token"),
        (
            "{% for m in messages %}{{ m.content.split('#')[-1] + eos_token }}{% endfor %}",
            ["a", "b#c"],
            "rewrites the last answer",
        ),
        (
            "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}<think>{% endif %}",
            ["a", "b"],
            "rewrites the last answer or what precedes it",
        ),
        (FORMS["gemma"], ["", "a", "b"], "refuses the messages: no system role"),
        ("{{ messages[7].content.x() }}", ["a", "b"], "refuses the messages"),
        ("{{ messages | length + 'a' }}", ["a", "b"], "fails: TypeError"),
        ("{{ ''.__class__.__mro__ }}", ["a", "b"], "refuses the messages: .* unsafe"),
        (FORMS["chatml"], [f"a{MARK}", "b"], r"private character U\+10FFFD: remove it"),
    ],
)
def test_a_chat_without_exact_answers_is_refused_with_the_reason(source, texts, reason):
    own, _ = tokenizers("llama3")
    system = "Be brief." if texts[0] == "" else ""
    messages = messages_of([text for text in texts if text], system)
    with pytest.raises(ChatError, match=reason):
        ChatTemplate(source, own).example(messages)
    raw = {"text": [], "messages": messages}
    with pytest.raises(RejectedExample, match=reason):
        chat_example(own, raw, TextOptions(chat_template=source))


def test_chats_are_encoded_in_the_template_of_the_tokenizer(tmp_path):
    path = write_tokenizer(tmp_path, "llama3")
    (tmp_path / "chat_template.jinja").write_text(FORMS["llama3"])
    own = Tokenizer(path)
    encoder = PromptEncoder(own, own.vocab_size)
    ids = encoder.encode_chat(
        messages_of(["Hi", "Yes?", "Who?"]), is_continuation=False, name="c", answer_prefix="I am"
    )
    said = {"user": ("Hi", "Who?"), "assistant": ("Yes?", "I am")}
    turns = [(role, said[role][i]) for i in range(2) for role in said]
    expected = BEGIN + "".join(f"{BEGIN}{role}{OTHER}\n\n{text}{END}" for role, text in turns)
    expected = expected.removesuffix(END)
    assert ids.tolist() == own.encode_markup(expected)
    after = encoder.encode_chat(messages_of(["Hi"]), is_continuation=True, name="c")
    alone = encoder.encode_chat(messages_of(["Hi"]), is_continuation=False, name="c")
    assert after.tolist() == alone[1:].tolist()
    with pytest.raises(InputError, match="c ends with a message of the assistant"):
        encoder.encode_chat(messages_of(["Hi", "b"]), is_continuation=False, name="c")
    with pytest.raises(InputError, match="c has half of a surrogate pair"):
        encoder.encode_chat(messages_of(["\ud83d"]), is_continuation=False, name="c")
    # The files that a run saves have no template unless they say so.
    assert Tokenizer.of_files(own.files).chat_template == ""
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    broken = Tokenizer(path)
    with pytest.raises(TokenizerError, match=r"the chat template of .* is not valid"):
        PromptEncoder(broken, 9).encode_chat(messages_of(["a"]), is_continuation=False, name="c")
