"""GGUF files: the tiny Mistral as llama.cpp would store it, and its tokenizer."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from command_line import assert_fails_in_one_line
from command_line import grit_jax_in_process as grit_jax
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_values
from safetensors.numpy import load_file
import sentencepiece
from tokenizer_files import write_tokenizer

from grit_jax import GritLM
from grit_jax.conversion import ConversionError, GgufModel, open_model
from grit_jax.conversion.orbax_model import write_orbax
from grit_jax.conversion.stored_model import ConversionWarning
from grit_jax.sharding import make_mesh
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.text.tokenizer_files import tokenizer_path

FOLDER = reference_values.FOLDER / "tiny-mistral"
KINDS = gguf.GGMLQuantizationType
# Of each kind of tensor a type of its own; 80 columns are not a multiple of a block.
TYPES = {
    "attn_q": KINDS.Q8_0,
    "attn_k": KINDS.Q4_1,
    "attn_v": KINDS.BF16,
    "attn_output": KINDS.Q5_0,
    "ffn_gate": KINDS.Q4_0,
    "ffn_up": KINDS.F16,
    "token_embd": KINDS.Q8_0,
}
TEXTS = (
    Path(__file__).read_text(),
    (Path(__file__).parents[2] / "README.md").read_text(),
    "  one  22\t333 \n\n 4  ünï 日本 🙂\n",
)


def stored_names():
    """Returns the tensors of the tiny model, by their names in a GGUF file."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    tensors = load_file(FOLDER / "model.safetensors").items()
    return {f"{names.get_name(n.removesuffix('.weight'))}.weight": (n, t) for n, t in tensors}


def kind_of(name):
    return TYPES.get(name.split(".")[-2], KINDS.F32)


def rounded(name, tensor):
    return gguf.dequantize(gguf.quantize(tensor, kind_of(name)), kind_of(name))


def in_turns(tensor, num_heads):
    """Returns a matrix with the rows of the two halves of each head interleaved."""
    halves = tensor.reshape(num_heads, 2, -1, tensor.shape[-1])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(tensor.shape)


def of_bytes(folder, split="gpt-2", style="gpt2"):
    """Returns metadata of a byte-level tokenizer with 320 tokens, and the tokenizer itself."""
    path = write_tokenizer(folder, style, size=320)
    content = json.loads(path.read_text())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    special = {token["content"] for token in content["added_tokens"]}
    metadata = {
        "model": "gpt2",
        "pre": split,
        "list": tokens,
        "types": [3 if token in special else 1 for token in tokens],
        "merges": [" ".join(pair) for pair in content["model"]["merges"]],
        "bos": 0,
        "eos": 1,
    }
    return metadata, Tokenizer(str(path))


def write(path, tokenizer, *, architecture="llama", add=None, left_out=(), changed=None):
    """Writes the tiny model as a GGUF file."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(3)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(80)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model(tokenizer["model"])
    writer.add_token_list(tokenizer["list"])
    writer.add_token_types(tokenizer["types"])
    if "pre" in tokenizer:
        writer.add_tokenizer_pre(tokenizer["pre"])
        writer.add_token_merges(tokenizer["merges"])
    else:
        writer.add_token_scores(tokenizer["scores"])
    writer.add_bos_token_id(tokenizer["bos"])
    writer.add_eos_token_id(tokenizer["eos"])
    if add is not None:
        add(writer)
    for name, (_, tensor) in stored_names().items():
        if name in left_out:
            continue
        if "attn_q" in name or "attn_k" in name:
            tensor = in_turns(tensor, 4 if "attn_q" in name else 2)
        if name == changed:
            tensor = tensor[:-1]
        data = gguf.quantize(tensor, kind_of(name))
        writer.add_tensor(name, data, raw_dtype=kind_of(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The path of the tiny model's file, and its tokenizer."""
    folder = tmp_path_factory.mktemp("gguf")
    metadata, tokenizer = of_bytes(folder)
    return write(folder / "tiny.gguf", metadata), tokenizer


def load(path):
    return GritLM.from_pretrained(path, dtype="float32", mesh=make_mesh(devices=jax.devices()[:1]))


def test_weights_are_dequantized_in_hugging_faces_order(tiny):
    model = open_model(tiny[0])
    assert isinstance(model, GgufModel)
    expected = {name: rounded(stored, t) for stored, (name, t) in stored_names().items()}
    for parameter in model.parameters:
        index = tuple(slice(0, size) for size in parameter.full_shape)
        whole = model.read(parameter, index)
        assert whole.dtype == model.dtype(parameter)
        for stack_index, name in parameter.tensors():
            tensor = parameter.to_tensor(whole[stack_index]).astype(np.float32)
            np.testing.assert_array_equal(tensor, expected[name], err_msg=name)
        first_output = len(parameter.stack_shape) + parameter.num_inputs
        if first_output < len(index):  # The second half of the heads, or of other outputs.
            size = parameter.full_shape[first_output]
            half = slice(size // 2, size)
            part = (*index[:first_output], half, *index[first_output + 1 :])
            np.testing.assert_array_equal(model.read(parameter, part), whole[part])
    types = {p.path[-1]: model.dtype(p).name for p in model.parameters}
    assert (types["value"], types["up"], types["query"]) == ("bfloat16", "float16", "float32")


@pytest.mark.slow
def test_logits_are_those_of_transformers_reading_the_same_file(tiny, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    path, _ = tiny
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    tokens = np.random.default_rng(0).integers(3, 320, (2, 60))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    finished = grit_jax("convert", "from-gguf", path, tmp_path / "checkpoint", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    for source in (path, tmp_path / "checkpoint"):
        module = load(source).model
        logits = module.logits(module(jnp.asarray(tokens)))
        np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("split", ["gpt-2", "smollm", "llama-bpe"])
def test_a_tokenizer_of_bytes_is_the_one_that_it_was_made_of(tmp_path, split):
    style = {"gpt-2": "gpt2", "llama-bpe": "llama3"}.get(split, split)
    metadata, expected = of_bytes(tmp_path, split, style)
    model = open_model(write(tmp_path / "model.gguf", metadata))
    tokenizer = load(model.folder).tokenizer
    for text in (*TEXTS, "<|begin|>", "a<|end|>"):
        assert tokenizer.encode(text) == expected.encode(text)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (expected.bos_id, expected.eos_id)
    assert tokenizer.decode([0, *tokenizer.encode("one"), 1]) == "one"
    if split == "gpt-2":  # The only one of them whose split transformers takes from the file.
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        for text in TEXTS:
            ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
            assert ids == tokenizer.encode(text)


def test_a_sentencepiece_model_is_the_one_that_it_was_made_of(tmp_path):
    original = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path("mistral")))
    pieces = range(original.vocab_size())
    special = {0: 2, 1: 3, 2: 3}
    metadata = {
        "model": "llama",
        "list": [original.id_to_piece(i) for i in pieces],
        "scores": [original.get_score(i) for i in pieces],
        "types": [special.get(i, 6 if original.is_byte(i) else 1) for i in pieces],
        "bos": 1,
        "eos": 2,
    }
    model = open_model(write(tmp_path / "model.gguf", metadata))
    tokenizer, expected = Tokenizer.of_files(model.tokenizer_files), Tokenizer()
    for text in (*TEXTS, "</s> <s>", "\n a", ""):
        assert tokenizer.ids(text).tolist() == expected.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == expected.decode(expected.encode(text))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'"),
        ({"add": lambda writer: writer.add_expert_count(8)}, "has experts"),
        ({"add": lambda writer: writer.add_uint16("split.count", 2)}, "--merge"),
        ({"add": lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)}, "'yarn'"),
        ({"add": lambda writer: writer.add_rope_scaling_factor(4.0)}, "'linear'"),
        ({"add": lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0)}, "'linear'"),
        (
            {"add": lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32))},
            "scaled rotary frequencies",
        ),
        (
            {"add": lambda writer: writer.add_array("llama.expert_weights_scale", [1.0, 2.0])},
            "llama.expert_weights_scale differs between layers",
        ),
        (
            {"add": lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32))},
            "unknown 1 tensors: blk.0.attn_q.bias",
        ),
        ({"left_out": ["blk.1.attn_v.weight"]}, "lacks 1 tensors: blk.1.attn_v.weight"),
        ({"left_out": ["token_embd.weight"]}, "lacks 1 tensors: token_embd.weight"),
        ({"changed": "blk.1.attn_v.weight"}, r"attn_v.weight has the shape \(15, 32\)"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, how, named):
    metadata, _ = of_bytes(tmp_path)
    path = write(tmp_path / "model.gguf", metadata, **how)
    with pytest.raises(ConversionError, match=rf"model\.gguf.*{named}"):
        open_model(path)


def test_a_setting_without_an_effect_is_warned_about(tmp_path):
    metadata, _ = of_bytes(tmp_path)
    path = write(tmp_path / "m.gguf", metadata, add=lambda writer: writer.add_logit_scale(2.0))
    with pytest.warns(ConversionWarning, match=r"m.gguf: .* without llama.logit_scale=2.0$"):
        open_model(path)


def test_a_tokenizer_that_is_not_known_can_be_given(tmp_path):
    metadata, given = of_bytes(tmp_path, split="another")
    path = write(tmp_path / "model.gguf", metadata)
    with pytest.raises(ConversionError, match=r"splits text as 'another'.*tokenizer=PATH"):
        load(path)
    mesh = make_mesh(devices=jax.devices()[:1])
    write_orbax(GgufModel(path, given), tmp_path / "checkpoint")
    for source, name in ((path, given.name), (tmp_path / "checkpoint", None)):
        model = GritLM.from_pretrained(source, mesh=mesh, tokenizer=name)
        assert model.tokenizer.encode("a word") == given.encode("a word")


def test_a_damaged_file_and_a_missing_package(tiny, tmp_path, monkeypatch):
    content = tiny[0].read_bytes()
    for number, damaged in enumerate((content[:-5000], content[:2000], b"not a model", b"")):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(damaged)
        with pytest.raises(
            ConversionError, match=rf"{number}\.gguf is not a GGUF file, or is damaged or"
        ):
            open_model(path)
    with pytest.raises(ConversionError, match="has no base model"):
        open_model(tiny[0], base=tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConversionError, match=r"pip install 'grit-jax\[gguf\]'"):
        open_model(tiny[0])


def test_a_tokenizer_that_is_not_known_leaves_nothing_behind(tmp_path):
    metadata, _ = of_bytes(tmp_path, split="another")
    path = write(tmp_path / "model.gguf", metadata)
    with pytest.raises(ConversionError, match="splits text as 'another'"):
        write_orbax(GgufModel(path), tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    finished = grit_jax("convert", "from-gguf", "nowhere.gguf", "checkpoint", cwd=tmp_path)
    assert_fails_in_one_line(finished, "nowhere.gguf")
