"""Published embedding models, in their layout with random weights, embed as they do there."""

import json
import shutil
import warnings

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_model import one_device
from tokenizer_files import BEGIN, END, write_tokenizer

from grit_jax import GritLM
from grit_jax.conversion import ConversionError, open_model
from grit_jax.conversion.export import write_hugging_face
from grit_jax.conversion.stored_model import ConversionWarning
from grit_jax.objectives.embedding import EmbeddingSpec

TEXTS = ["a", "Land beside water.", "\nfoo bar", "word " * 20]
WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages\nQuery:"
SIZES = {
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
}
FLAGS = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "lasttoken")
MODULES = "sentence_transformers.models"
NEW_POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"


def pooling_flags(flag):
    """Returns the older form of the settings of pooling."""
    flags = {f"pooling_mode_{name}": name == flag for name in FLAGS}
    return {"word_embedding_dimension": 16, **flags, "include_prompt": True}


# A local and a global layer.
GEMMA = {
    "num_hidden_layers": 2,
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}

# Of each model: its class in transformers, its own fields of config.json, its prompts, its pooling,
# and the tokens before and after a text. One without own fields is not normalized.
PUBLISHED = {
    "Qwen3-Embedding": (
        *("Qwen3", {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}),
        *({"query": WEB_SEARCH, "document": ""}, pooling_flags("lasttoken"), (), (END,)),
    ),
    "e5-mistral": (
        *("Mistral", {"sliding_window": 4096, "pad_token_id": 1}),
        *(
            {"web_search_query": f"{WEB_SEARCH} ", "sts_query": "unused"},
            pooling_flags("lasttoken"),
        ),
        *((BEGIN,), (END,)),
    ),
    "gte-Qwen2": (
        *("Qwen2", {"is_causal": False, "auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}}),
        *({"query": f"{WEB_SEARCH} "}, pooling_flags("lasttoken"), (), (END,)),
    ),
    "llama-embed-nemotron": (
        *("Llama", {"model_type": "llama_bidirec", "pooling": "avg", "temperature": 0.02}),
        *({"query": f"{WEB_SEARCH} ", "document": "passage: "}, pooling_flags("mean_tokens")),
        *((BEGIN,), ()),
    ),
    "EmbeddingGemma": (
        *("Gemma3Text", {"use_bidirectional_attention": True, "sliding_window": 8, **GEMMA}),
        {"query": "task: search result | query: ", "document": "title: none | text: "},
        *(pooling_flags("mean_tokens"), (BEGIN,), (END,)),
    ),
    "without the prompt, not normalized": (
        *("Qwen3", {}, {"query": WEB_SEARCH}),
        *({"embedding_dimension": 16, "pooling_mode": "mean", "include_prompt": False}, (), ()),
    ),
}


def save(folder, name):
    """Writes a published model for sentence-transformers, without its own code."""
    import torch
    import transformers

    architecture, own, prompts, pooling, begin, end = PUBLISHED[name]
    torch.manual_seed(0)
    fields = {
        key: value
        for key, value in own.items()
        if key not in ("architectures", "auto_map", "model_type", "pooling", "temperature")
    }
    config = getattr(transformers, f"{architecture}Config")(**SIZES | fields)
    getattr(transformers, f"{architecture}Model")(config).save_pretrained(folder)
    if own.get("model_type"):
        change(folder / "config.json", is_causal=False)
    write_tokenizer(folder, "llama3" if begin else "gpt2", 400, begin, end)
    special = {"bos_token": BEGIN if begin else None, "eos_token": END, "pad_token": END}
    settings = {**special, "padding_side": "left" if own else "right"}
    if architecture == "Gemma3Text":  # Its own class overrides parts of tokenizer.json.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    types = [f"{MODULES}.Transformer", f"{MODULES}.Pooling", f"{MODULES}.Normalize"]
    if not own:
        types = [types[0], NEW_POOLING]
    paths = ("", "1_Pooling", "2_Normalize")
    if name == "EmbeddingGemma":
        types[2:] = [f"{MODULES}.Dense", f"{MODULES}.Dense", f"{MODULES}.Normalize"]
        paths = (*paths[:2], "2_Dense", "3_Dense", "4_Normalize")
        write_dense(folder / "2_Dense", 16, 24)
        write_dense(folder / "3_Dense", 24, 16)
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (path, kind) in enumerate(zip(paths, types, strict=False))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": prompts, "default_prompt_name": None})
    )


def write_dense(folder, num_inputs, num_outputs):
    import torch

    folder.mkdir()
    settings = {"in_features": num_inputs, "out_features": num_outputs, "bias": False}
    settings["activation_function"] = "torch.nn.modules.linear.Identity"
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = {"linear.weight": torch.randn(num_outputs, num_inputs).numpy()}
    save_file(tensors, folder / "model.safetensors")


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small Qwen3-Embedding."""
    folder = tmp_path_factory.mktemp("base")
    save(folder, "Qwen3-Embedding")
    return folder


@pytest.fixture
def copy(base, tmp_path):
    """A copy of `base`, to be changed."""
    return shutil.copytree(base, tmp_path / "copy")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_embeds_as_in_sentence_transformers(tmp_path, name):
    from sentence_transformers import SentenceTransformer

    save(tmp_path, name)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    expected = {way: getattr(theirs, way)(TEXTS) for way in ("encode_query", "encode_document")}
    change(tmp_path / "config.json", **PUBLISHED[name][1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        ours = GritLM.from_pretrained(tmp_path, dtype="float32", mesh=one_device())
    assert ours.embedding_spec.normalize == ("not normalized" not in name)
    for way, embeddings in expected.items():
        got = getattr(ours, way)(TEXTS)
        np.testing.assert_allclose(got, embeddings, atol=2e-5, err_msg=way)
    if name != "EmbeddingGemma":
        return
    for purpose in (None, "embedding"):  # An export embeds as the model, there and here.
        folder = tmp_path / f"export-{purpose}"
        write_hugging_face(open_model(tmp_path), folder, purpose=purpose)
        again = SentenceTransformer(str(folder), device="cpu")
        for way, embeddings in expected.items():
            np.testing.assert_allclose(getattr(again, way)(TEXTS), embeddings, atol=2e-5)
        assert open_model(folder).config == open_model(tmp_path).config


def spec_of(folder):
    return EmbeddingSpec.from_fields(open_model(folder).fields)


def test_what_a_model_says_of_its_attention_is_followed(copy):
    assert spec_of(copy).attention == "cccc"
    settings = copy / "sentence_bert_config.json"
    settings.write_text(json.dumps({"config_args": {"is_causal": False}}))
    assert spec_of(copy).attention == "bbcc"
    settings.unlink()
    change(copy / "config.json", use_bidirectional_attention=True)
    assert spec_of(copy).attention == "bbcc"
    change(copy / "config.json", use_bidirectional_attention=None)
    code = {"AutoModel": "modeling_custom.Model", "AutoModelForCausalLM": "modeling_custom.LM"}
    change(copy / "config.json", auto_map=code)
    with pytest.warns(ConversionWarning, match=r"code \(modeling_custom\) is not run: pass atten"):
        assert spec_of(copy).attention == "bbcc"
    change(copy / "config.json", is_causal=True)
    assert spec_of(copy).attention == "cccc"
    change(copy / "config.json", is_causal=None, auto_map={"AutoModel": "modeling_gritlm7b.Model"})
    (copy / "config_sentence_transformers.json").unlink()
    assert spec_of(copy) == EmbeddingSpec(pooling="lasttoken", pool_instruction=True)
    (copy / "modules.json").unlink()
    assert spec_of(copy) == EmbeddingSpec()


def test_a_bidirectional_type_is_read_without_files_of_sentence_transformers(copy, tmp_path):
    from transformers import AutoConfig

    save(llama := tmp_path / "llama", "llama-embed-nemotron")
    for name in ("modules.json", "config_sentence_transformers.json"):
        (llama / name).unlink()
    own = PUBLISHED["llama-embed-nemotron"][1]
    change(llama / "config.json", **own, is_causal=None)
    spec = spec_of(llama)
    assert (spec.attention, spec.pooling, spec.pool_instruction) == ("bbcc", "mean", True)
    assert (spec.query_prompt, spec.document_prompt) == ("", "")
    write_hugging_face(open_model(llama), tmp_path / "export", purpose="embedding")
    config = AutoConfig.from_pretrained(tmp_path / "export")
    assert (config.model_type, config.is_causal) == ("llama", False)
    assert spec_of(tmp_path / "export") == spec
    change(llama / "config.json", pooling="colbert")
    with pytest.raises(ConversionError, match="pooling='colbert' is not supported, only avg, cls"):
        open_model(llama)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling_mode": "max"}, "pooling 'max' is not supported"),
        ({"pooling_mode": ["cls", "mean"]}, r"pooling \['cls', 'mean'\] is not supported"),
        (
            {"pooling_mode": "weightedmean", "include_prompt": False},
            "tokens are weighted by their index in the text, not in the prompt and the text",
        ),
    ],
)
def test_what_differs_is_said(copy, settings, message):
    (copy / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with pytest.warns(ConversionWarning, match=message):
        open_model(copy)


def test_other_modules_and_damaged_files_are_said(copy):
    modules = json.loads((copy / "modules.json").read_text())
    modules[2] |= {"type": "sentence_transformers.models.LayerNorm", "path": "2_LayerNorm"}
    (copy / "modules.json").write_text(json.dumps(modules))
    with pytest.warns(ConversionWarning, match=r"computed without LayerNorm \(2_LayerNorm\)"):
        open_model(copy)
    (copy / "modules.json").write_text('{"idx": 0}')
    with pytest.raises(ConversionError, match=r"modules\.json is not a list of modules"):
        open_model(copy)
