"""The original's numbers on tiny random models, and those models in our modules.

`tests/reference` was made by running the original PyTorch code of GritLM in float32.
"""

import json
from pathlib import Path

from flax import nnx
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from grit_jax.data.batch import Batch, ChatBatch, EmbeddingBatch, PackedTexts
from grit_jax.models import ARCHITECTURES, Decoder, make_config, make_model

FOLDER = Path(__file__).parent / "reference"
ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
MLP = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}


def load_values(architecture: str) -> dict[str, np.ndarray]:
    """Returns the numbers of the original by name."""
    return dict(np.load(FOLDER / f"{architecture}.npz"))


def load_model(architecture: str, **overrides) -> Decoder:
    """Returns our model with the weights of the original's tiny one."""
    folder = FOLDER / f"tiny-{architecture}"
    stored = json.loads((folder / "config.json").read_text())
    names = ARCHITECTURES[architecture].sizes
    fields = {name: value for name, value in stored.items() if name in names}
    fields["head_dim"] = stored["hidden_size"] // stored["num_attention_heads"]
    model = make_model(make_config(architecture, **fields | overrides), seed=0)
    tensors = load_file(folder / "model.safetensors")
    set_parameters(model, from_original(tensors, model.config))
    return model


def set_parameters(model: Decoder, values: dict[str, np.ndarray]) -> None:
    """Puts `values`, named as `named_parameters` names them, into the model."""
    state = nnx.state(model, nnx.Param)
    for path, variable in nnx.to_flat_state(state):
        value = values[".".join(path)]
        assert value.shape == variable.shape, path
        variable.set_value(jnp.asarray(value, variable.dtype))
    nnx.update(model, state)


def from_original(tensors: dict[str, np.ndarray], config) -> dict[str, np.ndarray]:
    """Returns the original's tensors (weights, or their gradients) under our names and shapes."""
    D, H = config.hidden_size, config.head_dim

    def stack(name: str) -> np.ndarray:
        layers = range(config.num_hidden_layers)
        return np.stack([tensors[f"model.layers.{layer}.{name}.weight"] for layer in layers])

    def heads(name: str) -> np.ndarray:  # [L, N * H, D] -> [L, D, N, H]
        weight = stack(f"self_attn.{name}")
        return weight.reshape(len(weight), -1, H, D).transpose(0, 3, 1, 2)

    def experts(name: str) -> np.ndarray:  # [L, out, in] for each expert -> [L, E, in, out]
        prefix = "block_sparse_moe.experts"
        numbers = range(config.num_local_experts)
        return np.stack([stack(f"{prefix}.{n}.{name}") for n in numbers], 1).swapaxes(2, 3)

    ours = {
        "embedding": tensors["model.embed_tokens.weight"],
        "head": tensors["lm_head.weight"].T,
        "norm.scale": tensors["model.norm.weight"],
        "layers.attention_norm.scale": stack("input_layernorm"),
        "layers.feed_forward_norm.scale": stack("post_attention_layernorm"),
        "layers.attention.output": stack("self_attn.o_proj")
        .reshape(-1, D, config.num_attention_heads, H)
        .transpose(0, 2, 3, 1),
    }
    ours |= {f"layers.attention.{name}": heads(theirs) for name, theirs in ATTENTION.items()}
    if config.has_experts:
        ours |= {f"layers.feed_forward.{name}": experts(theirs) for name, theirs in EXPERT.items()}
        ours["layers.feed_forward.router"] = stack("block_sparse_moe.gate").swapaxes(1, 2)
    else:
        mlp = {name: stack(theirs).swapaxes(1, 2) for name, theirs in MLP.items()}
        ours |= {f"layers.feed_forward.{name}": weight for name, weight in mlp.items()}
    return ours


def packed_texts(tokens: np.ndarray, attention_mask: np.ndarray, mask: np.ndarray) -> PackedTexts:
    """Returns the original's padded batch, one text a row, in our form."""
    count, length = tokens.shape
    return PackedTexts(
        tokens=np.where(attention_mask, tokens, 0).astype(np.int32),
        segment_ids=(np.arange(1, count + 1)[:, None] * attention_mask).astype(np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        mask=mask.astype(bool),
        num_texts=count,
    )


def training_batch(values: dict[str, np.ndarray]) -> Batch:
    """Returns the original's joint batch: 4 queries, 8 passages in groups of 2, 4 chats."""

    def embedding_texts(name: str) -> PackedTexts:
        attention_mask = values[f"train_{name}_attention_mask"]
        instruction = values[f"train_{name}_instruction_lens"][:, None]
        mask = attention_mask.astype(bool) & (np.arange(attention_mask.shape[1]) >= instruction)
        return packed_texts(values[f"train_{name}_input_ids"], attention_mask, mask)

    embedding = EmbeddingBatch(
        queries=embedding_texts("query"),
        passages=embedding_texts("passage"),
        positives=np.arange(4, dtype=np.int32) * 2,
        passage_ids=np.arange(8, dtype=np.int32),
    )
    chats = packed_texts(
        values["train_generative_input_ids"],
        values["train_generative_attention_mask"],
        values["train_generative_labels"] != -100,
    )
    return Batch({"embedding": embedding, "generative": ChatBatch(chats)})
