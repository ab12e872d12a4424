"""Ids are those that transformers reads from the same folder, and from an export."""

import functools
import json
import os
from pathlib import Path
import shutil
import tempfile
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

from hypothesis import given, settings, strategies
import pytest
from tokenizer_files import BEGIN, END, write_sentencepiece, write_tokenizer

from grit_jax.conversion.sidecar_files import write_chat_template
from grit_jax.conversion.sidecar_files import write_tokenizer as export
from grit_jax.inference.prompt_encoder import PromptEncoder, fit_to_length
from grit_jax.text.tokenizer import Tokenizer, TokenizerError
from grit_jax.text.tokenizer_files import tokenizer_path

TOOL, TURN = "<tool_call>", "<|turn|>"
LINES = Path(__file__).parents[2].joinpath("README.md").read_text().splitlines()
BPE = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
BPE |= {"remove_extra_whitespaces": False}
CHAT = [
    {"role": "user", "content": " Who?\n"},
    {"role": "assistant", "content": "  I."},
    {"role": "user", "content": "\tWhy?"},
]
TEXTS = strategies.lists(
    strategies.one_of(
        strategies.sampled_from(["  ", "\n\n", "    ", "\t", " a", "the", "1,0", TOOL, "\u2581"]),
        strategies.characters(codec="utf-8", exclude_characters="\0"),
        strategies.sampled_from("ab \n\r'é日🙂\u0301\u00a0\x07\x1f"),
    ),
    max_size=15,
).map("".join)


def write_settings(folder, **fields):
    fields = {"tokenizer_class": "LlamaTokenizer", **fields}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def mistral(folder):
    """Mistral's SentencePiece model, with the settings of Mistral 7B."""
    shutil.copy(tokenizer_path("mistral"), folder / "tokenizer.model")
    write_settings(folder, add_bos_token=True, add_eos_token=False)


def small_model(folder, **options):
    """A small SentencePiece model."""
    path = write_sentencepiece(folder, 500, LINES, **{**BPE, **options})
    path.rename(folder / "tokenizer.model")
    return Tokenizer(str(folder / "tokenizer.model")).vocab_size


def flags(folder, **fields):
    """A SentencePiece model with settings, which add BOS only if they say so."""
    small_model(folder)
    write_settings(folder, bos_token="<s>", eos_token="</s>", **fields)


def added_by_settings(folder):
    """Tokens that are added in tokenizer_config.json, one of which ends texts."""
    size = small_model(folder)
    special = {"special": True, "normalized": False}
    tokens = {"<unk>": special, "<s>": special, "</s>": special}
    added = {str(i): {"content": token, **flags} for i, (token, flags) in enumerate(tokens.items())}
    added[str(size)] = {"content": TURN, **special}
    added[str(size + 1)] = {"content": TOOL, "special": False, "normalized": True}
    write_settings(
        folder, added_tokens_decoder=added, eos_token=TURN, add_bos_token=True, add_eos_token=True
    )


def added_by_file(folder):
    """Tokens that are added in added_tokens.json."""
    size = small_model(folder)
    (folder / "added_tokens.json").write_text(json.dumps({TOOL: size, TURN: size + 1}))
    write_settings(folder, additional_special_tokens=[TURN], bos_token="<s>", eos_token="</s>")


def saved_by_transformers(folder):
    """A tokenizer.json of transformers with added tokens, beside the model that it was made of."""
    from transformers import AutoTokenizer

    small_model(folder)
    write_settings(folder, bos_token="<s>", eos_token="</s>", add_bos_token=True)
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens([TOOL])
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(folder)


def of_tiktoken(folder):
    """A tokenizer.json beside a file of tiktoken, as of Llama 3."""
    write_tokenizer(folder, "llama3")
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")


def without_bos(folder):
    """A tokenizer without BOS, as of Qwen, whose settings name none."""
    write_tokenizer(folder, "llama3", begin=())
    write_settings(folder, tokenizer_class="PreTrainedTokenizerFast", bos_token=None, eos_token=END)


def ignored_flag(folder):
    """A flag beside a tokenizer.json, which transformers ignores."""
    write_tokenizer(folder, "gpt2", begin=())
    fields = {"bos_token": BEGIN, "eos_token": END, "add_bos_token": True}
    write_settings(folder, tokenizer_class="PreTrainedTokenizerFast", **fields)


def of_style(style, begin, end, folder):
    write_tokenizer(folder, style, begin=begin, end=end)


KINDS = {
    "mistral": mistral,
    "no-flags": flags,
    "both-flags": functools.partial(flags, add_bos_token=True, add_eos_token=True),
    "settings": added_by_settings,
    "file": added_by_file,
    "saved": saved_by_transformers,
    "tiktoken": of_tiktoken,
    "no-bos": without_bos,
    "flag": ignored_flag,
    "metaspace": functools.partial(of_style, "metaspace", (BEGIN,), ()),
    "gemma": functools.partial(of_style, "gemma", (BEGIN,), ()),
    "qwen": functools.partial(of_style, "qwen", (), ()),
    "end": functools.partial(of_style, "smollm", (BEGIN,), (END,)),
    "only-end": functools.partial(of_style, "gpt2", (), (END,)),
}


@functools.cache
def load(kind):
    """Returns our tokenizer, and those of transformers for the folder and for its exports."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "folder")
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "mistral"}')
        KINDS[kind](folder)
        own, theirs = Tokenizer(folder), [AutoTokenizer.from_pretrained(folder)]
        # transformers has tokenizers of its own for some types of models.
        for model_type in ("mistral", "llama", "qwen2"):
            exported = Path(name, model_type)
            exported.mkdir()
            (exported / "config.json").write_text(json.dumps({"model_type": model_type}))
            export(own, exported, model_type, 512)
            write_chat_template(exported, own)
            theirs.append(AutoTokenizer.from_pretrained(exported))
        return own, Tokenizer(exported), theirs


def cut_text(tokenizer, text, max_length):
    encoder = PromptEncoder(tokenizer, tokenizer.vocab_size)
    encoded = encoder.encode(text, add_bos=True, add_eos=True, name="text")
    ends = [encoder.num_end_tokens(text)]
    with warnings.catch_warnings(category=UserWarning, action="ignore"):
        cut = fit_to_length([encoded], max_length, 100, num_end_tokens=ends, truncate=True)
    return cut[0].tokens.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers_and_survive_an_export(kind):
    own, again, theirs = load(kind)
    saved = Tokenizer.of_files(own.files)
    assert saved.fingerprint == own.fingerprint
    for same in (again, saved):
        for name in ("bos_id", "eos_id", "adds_bos", "adds_eos", "vocab_size"):
            assert getattr(same, name) == getattr(own, name), name

    @settings(deadline=None, max_examples=30)
    @given(TEXTS)
    def check(text):
        ids = [*own.begin_ids.tolist(), *own.encode(text), *own.end_ids.tolist()]
        for each in theirs:
            assert each(text).input_ids == ids
        if text.strip():  # Texts are cut before the tokens that end them.
            cut = cut_text(own, text, 8)
            assert cut == theirs[1](text, truncation=True, max_length=8).input_ids
        assert again.encode(text) == saved.encode(text) == own.ids(text).tolist()
        assert (
            own.encode_markup(f"{text}</s>")
            == theirs[1](f"{text}</s>", add_special_tokens=False).input_ids
        )

    check()
    chat = PromptEncoder(own, own.vocab_size).encode_chat(CHAT, is_continuation=False, name="chat")
    same = theirs[1].apply_chat_template(CHAT, add_generation_prompt=True).input_ids
    assert chat.tolist() == same
    for each in theirs:
        assert each.eos_token_id == own.eos_id
        assert each.bos_token_id == own.bos_id


@settings(deadline=None)
@given(TEXTS)
def test_an_exported_sentencepiece_model_has_the_same_ids(text):
    for kind in ("mistral", *OPTIONS):
        own, exported = exported_model(kind)
        assert exported.encode(text) == own.encode(text), kind
        ids = own.encode(text)
        # SentencePiece shows the unknown token, and strips more spaces where it strips any.
        if kind not in ("unknown", "stripped"):
            assert exported.decode(ids) == own.decode(ids)


OPTIONS = {
    "no-prefix": {"add_dummy_prefix": False},
    "stripped": {"remove_extra_whitespaces": True},
    "unknown": {"byte_fallback": False},
    "symbols": {"user_defined_symbols": [TOOL, "é日"]},
}


@functools.cache
def exported_model(kind):
    with tempfile.TemporaryDirectory() as name:
        if kind == "mistral":
            own = Tokenizer()
        else:
            small_model(Path(name), **OPTIONS[kind])
            own = Tokenizer(name)
        names = json.dumps(own.special_tokens).encode()
        files = {"tokenizer.json": own.exported(), "tokenizer_config.json": names}
        return own, Tokenizer.of_files(files)


def test_a_model_without_an_equal_tokenizer_json_is_refused(tmp_path):
    small_model(tmp_path, model_type="unigram")
    with pytest.raises(TokenizerError, match=r"cannot be written as tokenizer\.json: its model is"):
        Tokenizer(tmp_path).exported()
