"""Equality of the models and the joint loss with the original PyTorch code."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_values

from grit_jax.objectives.pooling import POOLINGS, normalize, pool
from grit_jax.sharding import make_mesh
from grit_jax.training.joint_loss import LossConfig, make_joint_loss
from grit_jax.training.optimizer import make_optimizer
from grit_jax.training.train_step import Trainer

ARCHITECTURES = ("mistral", "mixtral")


def assert_close(ours, theirs, relative=1e-4):
    """Compares relative to the largest value, since small values are mostly rounding errors."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=relative * np.abs(theirs).max())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def reference(request):
    return reference_values.load_values(request.param), reference_values.load_model(request.param)


@pytest.mark.parametrize(("name", "is_causal"), [("causal", True), ("bidirectional", False)])
def test_hidden_states(reference, name, is_causal):
    values, model = reference
    mask = values["embed_attention_mask"]
    hidden = model(
        values["embed_input_ids"], segment_ids=jnp.asarray(mask, jnp.int32), is_causal=is_causal
    )
    assert_close(hidden * mask[..., None], values[f"hidden_{name}"] * mask[..., None])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_embeddings(reference, pooling):
    values, model = reference
    attention_mask = values["embed_attention_mask"].astype(bool)
    mask = attention_mask & (np.arange(attention_mask.shape[1]) >= values["embed_instruction_len"])
    texts = reference_values.packed_texts(values["embed_input_ids"], attention_mask, mask)
    hidden = model(texts.tokens, texts.positions, texts.segment_ids, is_causal=False)
    embeddings = pool(
        hidden, texts.mask, texts.segment_ids, texts.positions, texts.num_texts, pooling
    )
    assert_close(embeddings, values[f"embedding_{pooling}_raw"])
    assert_close(normalize(embeddings), values[f"embedding_{pooling}_normalized"])


def test_logits_and_greedy_tokens(reference):
    values, model = reference
    assert_close(model.logits(model(values["prompt_ids"])), values["prompt_logits"])
    expected = values["greedy_ids"]
    logits = model.logits(model(expected))
    start = values["prompt_ids"].shape[1]
    np.testing.assert_array_equal(
        jnp.argmax(logits[:, start - 1 : -1], axis=-1), expected[:, start:]
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["full_attention", "sliding_window"])
def test_long_inputs_with_and_without_the_window(architecture, name):
    values = reference_values.load_values(architecture)
    # The tiny Mistral's configuration has a window of 64 tokens, the tiny Mixtral's has none.
    overrides = {"sliding_window": None} if name == "full_attention" else {}
    model = reference_values.load_model(architecture, **overrides)
    logits = model.logits(model(values["long_ids"]))[:, -4:]
    assert_close(logits, values[f"long_logits_{name}"])


@pytest.mark.slow
@pytest.mark.parametrize(("reduction", "factor"), [("mixed", 1.0), ("token", 0.003)])
def test_losses_and_gradients_of_a_joint_batch(reference, reduction, factor):
    values, model = reference
    is_mixtral = model.config.has_experts
    config = LossConfig(
        # In the Mixtral files both variants are sums over tokens divided by rows.
        generative_reduction="token" if is_mixtral else reduction,
        generative_weight=factor,
        embedding_weight=1.0,
    )
    joint_loss = make_joint_loss(config)
    batch = reference_values.training_batch(values)
    graph, state = nnx.split(model)
    compute = jax.value_and_grad(
        lambda state: joint_loss.value(nnx.merge(graph, state), {}, batch), has_aux=True
    )
    (loss, parts), gradient = compute(state)
    assert_close(loss, values[f"train_{reduction}_loss"])
    assert_close(parts["embedding_loss"], values[f"train_{reduction}_loss_emb"])
    if is_mixtral:
        assert_close(parts["router_loss"], values["train_router_aux_loss"])

    prefix = f"train_{reduction}_grad/"
    theirs = {key.removeprefix(prefix): values[key] for key in values if key.startswith(prefix)}
    expected = reference_values.from_original(theirs, model.config)
    ours = {".".join(path): leaf for path, leaf in nnx.to_flat_state(gradient)}
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(ours[name][...], value)


@pytest.mark.slow
def test_five_steps_of_adamw(reference):
    values, model = reference
    is_mixtral = model.config.has_experts
    loss = make_joint_loss(LossConfig(generative_reduction="token" if is_mixtral else "mixed"))
    optimizer = make_optimizer(
        lambda step: 1e-3 * (10 - step) / 10,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        embedding_lr_multiplier=1.0,
        mu_dtype="float32",
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    trainer = Trainer(model.config, loss, optimizer, mesh)
    parameters = nnx.to_pure_dict(nnx.state(model))
    state = trainer.state_from(lambda _: jax.tree.map(jnp.copy, parameters), seed=0)
    batch = trainer.to_devices(reference_values.training_batch(values))
    for row in values["adamw_trace"]:
        state, metrics = trainer.step(state, batch)
        router = metrics.get("router_loss", 0.0) * getattr(model.config, "router_aux_loss_coef", 0)
        ours = [
            metrics["loss"],
            metrics["embedding_loss"],
            metrics["generative_loss"] + router,
            metrics["gradient_norm"],
        ]
        # A loss that has all but vanished is the difference of large scores.
        np.testing.assert_allclose(ours, row, rtol=1e-4, atol=1e-5 * values["adamw_trace"][0, 0])
