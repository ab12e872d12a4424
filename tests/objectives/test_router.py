"""The load-balancing loss against its formula, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax.objectives.router import load_balancing_loss

LAYERS, TOKENS, EXPERTS = 3, 20, 4


def statistics(probabilities, choices_a_token):
    """Returns the statistics of a router, and the loss by loops over layers, tokens and choices."""
    layers, tokens, experts = probabilities.shape
    choices = np.zeros((layers, choices_a_token, experts))
    for layer in range(layers):
        for token in range(tokens):
            order = np.argsort(-probabilities[layer, token])
            for choice in range(choices_a_token):
                choices[layer, choice, order[choice]] += 1

    loss = 0.0
    for choice in range(choices_a_token):
        for expert in range(experts):
            chosen = sum(choices[layer, choice, expert] for layer in range(layers))
            probability = sum(
                probabilities[layer, token, expert]
                for layer in range(layers)
                for token in range(tokens)
            )
            loss += experts * (chosen / (layers * tokens)) * (probability / (layers * tokens))
    collected = (choices, probabilities.sum(axis=1), np.full(layers, float(tokens)))
    return tuple(jnp.asarray(part, jnp.float32) for part in collected), loss


@pytest.mark.parametrize("choices_a_token", [1, 2, 3])
def test_it_is_the_formula(choices_a_token):
    random = np.random.default_rng(choices_a_token)
    probabilities = random.dirichlet(np.full(EXPERTS, 0.5), (LAYERS, TOKENS))
    collected, expected = statistics(probabilities, choices_a_token)
    np.testing.assert_allclose(load_balancing_loss(*collected), expected, rtol=1e-5)


@pytest.mark.parametrize("choices_a_token", [1, 2])
def test_perfect_balance_costs_the_number_of_choices_and_imbalance_more(choices_a_token):
    even = jnp.full((LAYERS, choices_a_token, EXPERTS), TOKENS / EXPERTS)
    probabilities = jnp.full((LAYERS, EXPERTS), TOKENS / EXPERTS)
    tokens = jnp.full(LAYERS, float(TOKENS))
    balanced = load_balancing_loss(even, probabilities, tokens)
    np.testing.assert_allclose(balanced, choices_a_token, rtol=1e-6)

    to_one = jnp.zeros_like(even).at[..., 0].set(TOKENS)
    skewed = jnp.full((LAYERS, EXPERTS), TOKENS * 0.1).at[:, 0].set(TOKENS * 0.7)
    assert load_balancing_loss(to_one, skewed, tokens) > balanced
    gradient = jax.grad(load_balancing_loss, argnums=1)(to_one, skewed, tokens)
    assert (gradient[:, :1] > gradient[:, 1:]).all(), "the favourite must be made less likely"


def test_no_tokens_cost_nothing():
    loss = load_balancing_loss(jnp.zeros((1, 2, 4)), jnp.zeros((1, 4)), jnp.zeros(1))
    assert loss == 0
