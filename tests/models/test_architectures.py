"""Equality with transformers: hidden states, logits, gradients, greedy text and round trips."""

from flax import nnx
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizer_files import write_tokenizer

from grit_jax import GritLM
from grit_jax.conversion import open_model
from grit_jax.conversion.export import write_hugging_face
from grit_jax.conversion.layout import parameters
from grit_jax.inference.loading import load_module
from grit_jax.sharding import make_mesh

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# 30 tokens are beyond the original length.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 100.0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 100.0,
}
SLIDING, FULL = "sliding_attention", "full_attention"
WINDOWS = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
MODELS = {
    "ministral3": (
        "Ministral3",
        # As in Mistral Nemo, the heads together are not as wide as the model.
        {
            "head_dim": 12,
            "pad_token_id": 0,
            "rope_parameters": YARN | {"llama_4_scaling_beta": 0.5},
        },
    ),
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"rope_parameters": YARN, **WINDOWS}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "layer_types": [SLIDING, FULL],
            "sliding_window": 6,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 10.0},
                FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
            },
            "query_pre_attn_scalar": 12,
            "final_logit_softcapping": 2.0,
        },
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """The model of transformers, its folder and ours."""
    import torch
    import transformers

    name, fields = MODELS[request.param]
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{name}{'Text' * (name == 'Gemma3')}Config")
    theirs = getattr(transformers, f"{name}ForCausalLM")(config_class(**(SIZES | fields))).eval()
    with torch.no_grad():  # Biases start at 0, and scales at 1.
        for parameter_name, parameter in theirs.named_parameters():
            if parameter_name.endswith("bias") or "norm" in parameter_name:
                parameter += 0.2 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    write_tokenizer(folder, "llama3", 300)
    stored = open_model(folder)
    return theirs, stored, load_module(stored, "float32", make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, 30))


def assert_close(ours, theirs, relative=1e-5):
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=relative * np.abs(theirs).max())


def their_hidden(theirs, tokens, *, is_causal):
    import torch

    theirs.config.is_causal = is_causal
    for layer in theirs.model.layers:
        layer.self_attn.is_causal = is_causal
    hidden = theirs.model(torch.tensor(tokens)).last_hidden_state
    theirs.config.is_causal = True
    for layer in theirs.model.layers:
        layer.self_attn.is_causal = True
    return hidden


def their_logits(theirs, hidden):
    logits = theirs.lm_head(hidden)
    cap = getattr(theirs.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * (logits / cap).tanh()


@pytest.mark.parametrize("is_causal", [True, False])
def test_hidden_states_and_logits(model, tokens, is_causal):
    theirs, _, ours = model
    hidden = ours(tokens, is_causal=is_causal)
    expected = their_hidden(theirs, tokens, is_causal=is_causal)
    assert_close(hidden, expected)
    assert_close(ours.logits(hidden), their_logits(theirs, expected))


@pytest.mark.slow
def test_gradients(model, tokens, tmp_path):
    """A sum of a next-token loss on causal states and a similarity of bidirectional ones."""
    import torch

    theirs, stored, ours = model
    graph, state = nnx.split(ours)

    def loss(state):
        model = nnx.merge(graph, state)
        logits = model.logits(model(tokens))[:, :-1]
        targets = jax.nn.one_hot(tokens[:, 1:], logits.shape[-1])
        next_token = -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, -1))
        first, second = model(tokens, is_causal=False).mean(1)
        return next_token + first @ second

    gradients = flatten_dict(nnx.to_pure_dict(jax.grad(loss)(state)))
    logits = their_logits(theirs, their_hidden(theirs, tokens, is_causal=True))[:, :-1]
    targets = torch.tensor(tokens[:, 1:]).flatten()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
    first, second = their_hidden(theirs, tokens, is_causal=False).mean(1)
    theirs.zero_grad()
    (expected + first @ second).backward()
    # Stored, the gradients of experts have the names of the weights in a checkpoint.
    of_theirs = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    theirs.save_pretrained(tmp_path, state_dict=of_theirs)
    expected = load_file(tmp_path / "model.safetensors")
    for parameter in parameters(stored.config):
        for index, name in parameter.tensors():
            gradient = np.asarray(gradients[parameter.path])[index]
            assert_close(parameter.to_tensor(gradient), torch.tensor(expected[name]), 1e-4)


def test_greedy_text(model, tokens):
    """With a cache, beyond the original length of a model whose rotary frequencies are scaled."""
    import torch

    theirs, _, ours = model
    expected = theirs.generate(
        torch.tensor(tokens), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    found = GritLM(ours, make_mesh(devices=jax.devices()[:1])).generate(
        tokens.tolist(), max_new_tokens=8
    )
    np.testing.assert_array_equal(found, expected[:, tokens.shape[1] :].numpy())


def test_a_round_trip_gives_the_same_bits(model, tmp_path):
    theirs, stored, _ = model
    write_hugging_face(stored, tmp_path / "export")
    before = load_file(stored.folder / "model.safetensors")
    after = load_file(tmp_path / "export" / "model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    again = open_model(tmp_path / "export")
    assert again.config == stored.config
    assert type(theirs).from_pretrained(tmp_path / "export").config.rope_parameters == (
        theirs.config.rope_parameters
    )


@pytest.mark.parametrize("model", ["qwen3_moe"], indirect=True)
def test_stacked_experts_are_those_of_a_published_checkpoint(model, tmp_path):
    """Transformers 5 can save the experts of a layer in one tensor, as it has them in memory."""
    theirs, stored, _ = model
    theirs.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    stacked = open_model(tmp_path)
    assert stacked.config == stored.config
    for parameter in stored.parameters:
        index = tuple(slice(0, size) for size in parameter.full_shape)
        parts = [index, *(index[:i] + (slice(1, 3),) + index[i + 1 :] for i in range(len(index)))]
        for part in parts if "mlp" in parameter.name else parts[:1]:
            np.testing.assert_array_equal(
                stacked.read(parameter, part), stored.read(parameter, part), err_msg=parameter.name
            )
