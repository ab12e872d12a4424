"""Every config.json is read as AutoModelForCausalLM reads it, or refused in one line."""

import functools
import json
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.conversion import ConversionError, HuggingFaceModel
from grit_jax.conversion.stored_model import ConversionWarning
from grit_jax.inference.loading import load_module
from grit_jax.models import unread_fields
from grit_jax.sharding import make_mesh

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
TOKENS = np.random.default_rng(0).integers(3, 64, (1, 12))
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"type": "linear", "factor": 2.0}
FULL, SLIDING = "full_attention", "sliding_attention"
CLASSES = (
    "Mistral",
    "Ministral",
    "Ministral3",
    "Llama",
    "Mixtral",
    "Qwen2",
    "Qwen3",
    "Qwen3Moe",
    "Gemma3",
)
EXPERTS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
}
# Of the 12 tokens, some are beyond the original length.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
    "rope_theta": 20.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "rope_theta": 10.0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 20.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 8,
}
QWEN_MIX = {
    "use_sliding_window": True,
    "sliding_window": 3,
    "max_window_layers": 1,
    "layer_types": ...,
}
MIX = {"sliding_window": 3, "layer_types": [SLIDING, FULL]}
# Gemma's fields in transformers 4.
OLD_ROPE = {
    "rope_parameters": ...,
    "rope_theta": 50.0,
    "rope_local_base_freq": 20,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}

# Class, changes to config.json (... removes a field), and a part of the warning, if there is one.
READ = [
    ("Mistral", {}, None),
    ("Mistral", {"rope_parameters": ..., "rope_theta": 5000.0}, None),
    ("Mistral", {"rope_parameters": ..., "rope_theta": 1000000}, None),
    ("Mixtral", {"rope_parameters": ...}, None),
    ("Llama", {"rope_parameters": ROPE, "rope_scaling": {"rope_theta": 77.0}}, None),
    ("Llama", {"rope_parameters": ROPE | {"rope_theta": 77.0}, "rope_scaling": ROPE}, None),
    ("Llama", {"rope_parameters": ROPE | LINEAR, "rope_scaling": {"type": "default"}}, None),
    ("Llama", {"rope_parameters": ROPE | {"rope_theta": 77.0}, "rope_theta": 55.0}, None),
    ("Llama", {"rope_parameters": {}, "rope_theta": 77.0}, None),
    ("Llama", {"rope_parameters": ..., "rope_scaling": None, "rope_theta": 77.0}, None),
    ("Llama", {"rope_parameters": ..., "rope_scaling": {"factor": 8.0}}, "rope_scaling.factor=8.0"),
    ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("Mistral", {"head_dim": None}, None),
    ("Llama", {"rms_norm_eps": ...}, None),
    ("Mixtral", {"rms_norm_eps": ...}, None),
    ("Llama", {"hidden_act": "swish"}, None),
    ("Llama", {"pretraining_tp": 2}, None),
    ("Llama", {"torch_dtype": "bfloat16", "dtype": "float32"}, None),
    ("Mistral", {"sliding_window": 3}, None),
    ("Mistral", {"sliding_window": 3, "use_sliding_window": False}, "use_sliding_window=False"),
    ("Mistral", {"sliding_window": 3, "layer_types": [FULL, FULL]}, None),
    ("Mistral", {"sliding_window": 3, "layer_types": [SLIDING, SLIDING]}, None),
    ("Mistral", {"sliding_window": 3, "layer_types": None}, None),
    ("Llama", {"sliding_window": 3}, "sliding_window=3"),
    ("Mixtral", {"sliding_window": 3}, None),
    ("Mixtral", {"sliding_window": 3, "layer_types": [FULL, SLIDING]}, "layer_types="),
    ("Mixtral", {"num_experts_per_tok": 1}, None),
    ("Mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ("Llama", {"rope_parameters": ROPE, "rope_scaling": LINEAR}, None),
    ("Mixtral", {"rope_parameters": LINEAR}, None),
    ("Llama", {"rope_parameters": LLAMA3}, None),
    ("Llama", {"rope_parameters": ..., "rope_theta": 20.0, "rope_scaling": LLAMA3}, None),
    ("Mistral", {"rope_parameters": YARN}, None),
    ("Qwen3", {"rope_parameters": YARN | {"attention_factor": 1.5, "truncate": False}}, None),
    ("Llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}, None),
    ("Llama", {"rope_parameters": YARN | {"beta_fast": 3.0, "beta_slow": 0.5}}, None),
    ("Llama", {"rope_parameters": YARN | {"factor": None}}, None),
    ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}, None),
    ("Qwen3", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}, None),
    (
        "Llama",
        {"rope_parameters": ..., "rope_scaling": DYNAMIC, "max_position_embeddings": 8},
        None,
    ),
    ("Mistral", {"rope_parameters": ROPE | LONGROPE}, None),
    ("Llama", {"rope_parameters": ..., "rope_scaling": LONGROPE | {"factor": 4.0}}, None),
    (
        "Llama",
        {
            "rope_parameters": LONGROPE | {"original_max_position_embeddings": None},
            "original_max_position_embeddings": 16,
        },
        None,
    ),
    ("Ministral3", {}, None),
    ("Ministral3", {"rope_parameters": ...}, None),
    ("Ministral3", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}}, None),
    ("Qwen2", {}, None),
    ("Qwen3", {}, None),
    ("Qwen3", {"head_dim": 8, "rope_parameters": ..., "rope_theta": 5e5}, None),
    ("Qwen2", {"sliding_window": 3}, None),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}, None),
    ("Qwen3", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}, None),
    ("Qwen3", {"use_sliding_window": True, "sliding_window": 3, "layer_types": ...}, None),
    ("Qwen3Moe", {"norm_topk_prob": True}, None),
    ("Qwen3Moe", {"num_local_experts": ..., "num_experts": 4, "max_window_layers": 48}, None),
    ("Qwen3Moe", {"num_experts": 7, "intermediate_size": 7, "sliding_window": 3}, None),
    ("Qwen3", QWEN_MIX, None),
    ("Qwen2", {"use_sliding_window": True, "max_window_layers": 5, **MIX}, None),
    ("Mistral", MIX, None),
    ("Ministral", {}, None),
    ("Ministral", MIX, None),
    ("Gemma3", {}, None),
    ("Gemma3", {"tie_word_embeddings": ...}, None),
    ("Gemma3", MIX | OLD_ROPE, None),
    ("Gemma3", {"layer_types": ..., "sliding_window_pattern": 2, "sliding_window": 3}, None),
    ("Gemma3", {"layer_types": [FULL, FULL], "query_pre_attn_scalar": 3}, None),
    ("Gemma3", {"final_logit_softcapping": 1.0, "rope_parameters": ...}, None),
    ("Gemma3", {"attn_logit_softcapping": 1.0}, "attn_logit_softcapping=1.0"),
    ("Mistral", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
]
REFUSED = [
    ("Llama", {"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "rope_scaling.*'ntk'"),
    ("Llama", {"rope_parameters": LONGROPE | {"long_factor": [1.0]}}, "long_factor must have"),
    ("Llama", {"rope_parameters": LONGROPE | {"long_factor": 2.0}}, "long_factor=2.0 must be"),
    ("Mistral", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.5}}, "'mistral' with"),
    (
        "Ministral3",
        {"rope_parameters": ROPE | {"llama_4_scaling_beta": 0.1}},
        "rope_type='default'",
    ),
    ("Llama", {"rope_parameters": ROPE | {"rope_type": "llama3"}}, "rope_parameters.*need factor"),
    ("Llama", {"rope_scaling": LINEAR | {"beta_fast": 2.0}}, "'linear' have no beta_fast"),
    ("Llama", {"rope_scaling": LINEAR, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("Qwen3Moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
    ("Qwen3Moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
    ("Qwen3Moe", {"use_sliding_window": True}, "use_sliding_window=True"),
    ("Qwen3Moe", {"num_experts_per_tok": 5}, "num_experts_per_tok=5"),
    ("Llama", {"rope_parameters": {FULL: ROPE, SLIDING: ROPE}}, "differs between layers"),
    ("Mistral", {"layer_types": [FULL]}, "layer_types has 1 layers, but num_hidden_layers=2"),
    ("Mistral", {"layer_types": [FULL, SLIDING], "sliding_window": None}, "sliding_window is not"),
    ("Gemma3", {"rope_parameters": ROPE}, "rope_parameters has rope_theta, rope_type, but"),
    ("Gemma3", {"rope_parameters": {SLIDING: LINEAR}}, "sliding_attention of type 'linear'"),
    ("Gemma3", {"hidden_activation": "silu"}, "hidden_activation='silu'"),
    ("Mistral", {"layer_types": ["chunked_attention"]}, "layers of type chunked_attention"),
    ("Mistral", {"sliding_window": 0}, "json: sliding_window must be positive, not 0"),
    ("Mistral", {"sliding_window": -1}, "json: sliding_window must be positive, not -1"),
    ("Mistral", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("Mistral", {"quantization_config": {"quant_method": "awq"}}, "quantized .'awq'"),
    ("Mistral", {"vocab_size": 63}, r"\(64, 32\).*\(63, 32\)"),
    ("Mistral", {"model_type": ...}, "model_type=None"),
    ("Mistral", {"model_type": "phi3"}, "model_type='phi3'"),
]


def config_class(name):
    import transformers

    return getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small model of each class, with heads and key/value heads of equal number in Mistral."""
    import torch
    import transformers

    root = tmp_path_factory.mktemp("models")
    for name in CLASSES:
        torch.manual_seed(0)
        config = config_class(name)(**SIZES, **EXPERTS.get(name, {}))
        getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(root / name)
    return {name: root / name for name in CLASSES}


@pytest.fixture(scope="module")
def logits():
    """A function that computes our logits; variants of one configuration are computed once."""
    mesh = make_mesh(devices=jax.devices()[:1])

    @functools.cache
    def compute(name, config):
        module = load_module(models[name, config], "float32", mesh)
        return np.asarray(module.logits(module(jnp.asarray(TOKENS))))

    models = {}

    def logits(name, model):
        models[name, model.config] = model
        return compute(name, model.config)

    return logits


def variant(folders, tmp_path, name, changes):
    folder = tmp_path / "variant"
    shutil.copytree(folders[name], folder)
    fields = json.loads((folder / "config.json").read_text()) | changes
    fields = {field: value for field, value in fields.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(("name", "changes", "warned"), READ)
def test_the_same_logits(folders, logits, tmp_path, name, changes, warned):
    import torch
    from transformers import AutoModelForCausalLM

    folder = variant(folders, tmp_path, name, changes)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = HuggingFaceModel(folder)
    np.testing.assert_allclose(
        logits(name, model), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (warned is not None)
    assert all(str(folder / "config.json") in message for message in messages)
    assert not warned or warned in messages[0]


def test_the_text_model_of_a_model_for_images(logits, tmp_path):
    import torch
    import transformers

    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    text = transformers.Gemma3TextConfig(**SIZES, **MIX)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(TOKENS)).logits.numpy()
    with pytest.warns(ConversionWarning, match="without multi_modal_projector and vision_tower"):
        model = HuggingFaceModel(tmp_path)
    np.testing.assert_allclose(logits("images", model), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "changes", "named"), REFUSED)
def test_refused(folders, tmp_path, name, changes, named):
    folder = variant(folders, tmp_path, name, changes)
    with pytest.raises(ConversionError, match=f"^{re.escape(str(folder))}.*{named}"):
        HuggingFaceModel(folder)


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_of_transformers_is_known(name):
    import transformers

    config = config_class(name)()
    generation = transformers.GenerationConfig()._get_default_generation_params()
    assert unread_fields({**generation, **config.to_dict()}) == {}
