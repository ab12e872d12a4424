"""Exports of random small models, read by transformers and sentence-transformers as by GritLM."""

import dataclasses
import inspect
import itertools
import random
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from small_model import one_device
import tokenizer_files

from grit_jax import GritLM
from grit_jax.conversion import open_model
from grit_jax.conversion.export import EXPORTED_PATTERNS, write_hugging_face
from grit_jax.conversion.stored_tokenizer import find_tokenizer
from grit_jax.objectives.pooling import POOLINGS
from grit_jax.text.templates import embedding_prefix

TEXTS = (
    *("a", "Land beside water.", "word " * 60, "def f(x):\n    if x:\n        return 1\n"),
    *("\nfoo bar", "\n\nfoo", "\r\nfoo", "\tfoo", " x", "  two  spaces", ">\nfoo", "1234.5"),
    *("🙂", "👩‍👩‍👧 family", "ünï 日本", "</s> <s>", f"{tokenizer_files.END} end", "<|embed|>\nx"),
)
INSTRUCTIONS = {"query_instruction": "Find it", "document_instruction": ""}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
VOCAB_SIZE = 700


def sentencepiece(folder, **settings):
    tokenizer_files.write_llama_tokenizer(folder, VOCAB_SIZE, **settings)


def of_style(style, begin=(tokenizer_files.BEGIN,), end=()):
    return lambda folder: tokenizer_files.write_tokenizer(folder, style, VOCAB_SIZE, begin, end)


TOKENIZERS = {
    "SentencePiece": sentencepiece,
    "SentencePiece, EOS": lambda folder: sentencepiece(folder, add_eos_token=True),
    "SentencePiece, left": lambda folder: sentencepiece(
        folder, padding_side="left", pad_token="</s>"
    ),
    "SentencePiece, no BOS": lambda folder: sentencepiece(folder, add_bos_token=False),
    "llama3": of_style("llama3"),
    "llama3, EOS": of_style("llama3", end=(tokenizer_files.END,)),
    "gpt2, no BOS": of_style("gpt2", begin=()),
    "smollm": of_style("smollm"),
    "metaspace": of_style("metaspace"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """An export: its model, its tokenizer and how it embeds."""

    architecture: str
    tokenizer: str
    pooling: str
    attention: str
    sliding_window: int | None


def sample_cases(count):
    """Returns cases in which every value of a field, and most pairs of values, occur."""
    generator = random.Random(0)
    values = (
        ("Mistral", "Llama", "Mixtral", "Qwen2", "Qwen3"),
        tuple(TOKENIZERS),
        POOLINGS,
        EXPORTED_PATTERNS,
        (5, None, 1),
    )

    def shuffled_forever(choices):
        while True:
            yield from generator.sample(choices, len(choices))

    columns = map(shuffled_forever, values)
    return [Case(*fields) for fields in itertools.islice(zip(*columns, strict=False), count)]


@pytest.fixture(scope="module")
def tokenizer_folders(tmp_path_factory):
    """The folder of each kind of tokenizer."""
    folders = {}
    for name, write in TOKENIZERS.items():
        folders[name] = tmp_path_factory.mktemp("tokenizer")
        write(folders[name])
    return folders


def save_model(case, folder):
    """Writes a random model, without its tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    options = {"num_hidden_layers": 1, "vocab_size": VOCAB_SIZE}
    if case.architecture == "Mixtral":
        options["num_local_experts"] = 4
    if case.architecture == "Llama":
        options["tie_word_embeddings"] = True
    else:
        options["sliding_window"] = case.sliding_window
    if case.architecture.startswith("Qwen"):
        options |= {"use_sliding_window": case.sliding_window is not None, "max_window_layers": 0}
    config = getattr(transformers, f"{case.architecture}Config")(**SIZES, **options)
    model = getattr(transformers, f"{case.architecture}ForCausalLM")(config)
    model.save_pretrained(folder)


def shares_a_token(tokenizer, prompt, text):
    """Returns whether a token has characters of both the prompt and the text."""
    ids = tokenizer.encode(prompt)
    return tokenizer.encode(prompt + text)[: len(ids)] != ids


@pytest.mark.slow
@pytest.mark.parametrize("case", sample_cases(9), ids=str)
def test_an_export_is_read_as_gritlm_reads_it(case, tokenizer_folders, tmp_path):
    from sentence_transformers import SentenceTransformer
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, folder = tmp_path / "source", tmp_path / "exported"
    save_model(case, source)
    for path in tokenizer_folders[case.tokenizer].iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    how = {"attention": case.attention, "pooling": case.pooling, **INSTRUCTIONS}
    write_hugging_face(open_model(source), folder, **how)
    ours = GritLM.from_pretrained(folder, dtype="float32", mesh=one_device())
    original = find_tokenizer(open_model(source), None)
    # transformers takes Qwen2's tokenizer for a Qwen2, if it may not use the code in the folder.
    trusted = case.pooling == "weightedmean" or case.architecture == "Qwen2"
    theirs = SentenceTransformer(str(folder), trust_remote_code=trusted, device="cpu")
    default_length = inspect.signature(ours.encode).parameters["max_length"].default
    assert theirs.max_seq_length == min(default_length, SIZES["max_position_embeddings"])

    texts, prompt = list(TEXTS), embedding_prefix("Given a word, find its meaning")
    options = {"truncate": True, "batch_size": 1}  # One row a call: few programs to compile.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Texts are truncated, and some have "</s>".
        expected = {
            "encode": ours.encode(texts, instruction=prompt, **options),
            "without prompt": ours.encode(texts, **options),
            "query": ours.encode_query(texts, **options),
            "document": ours.encode_document(texts, **options),
        }
    plain = AutoTokenizer.from_pretrained(folder)
    plain.split_special_tokens = True
    for text in texts:
        ids = original.encode(text)
        assert ours.tokenizer.encode(text) == ids
        assert theirs.tokenizer(text, add_special_tokens=False).input_ids == ids, ascii(text)
        assert plain(text, add_special_tokens=False).input_ids == ids, ascii(text)
    results = {
        "encode": theirs.encode(texts, prompt=prompt),
        "without prompt": theirs.encode(texts, prompt=""),
        "query": theirs.encode_query(texts),
        "document": theirs.encode_document(texts),
    }
    prompts = {"encode": prompt, "query": theirs.prompts["query"]}
    for name, embeddings in expected.items():
        wrong = np.abs(results[name] - embeddings).max(axis=1) > 1e-4
        wrong = list(itertools.compress(texts, wrong))
        if case.pooling == "mean":  # sentence-transformers does not pool what they share.
            start = prompts.get(name, theirs.prompts["document"])
            wrong = [text for text in wrong if not shares_a_token(original, start, text)]
        assert not wrong, name
    np.testing.assert_array_equal(theirs.encode(texts), results["document"])

    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 20))
    causal = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = causal(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(
        ours.model.logits(ours.model(jnp.asarray(tokens))), logits, atol=1e-4 * np.abs(logits).max()
    )
