"""Sampling: filters equal those of transformers, and frequencies equal probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from grit_jax.inference.sampling import Sampling, as_sampling, choose_tokens, filter_logits

ROWS, VOCABULARY = 6, 200
THEIRS = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
CASES = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 1000},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 1e-4},
    {"temperature": 1.0, "min_p": 0.2},
    {"repetition_penalty": 1.4},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.8},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_filters_are_those_of_transformers(options):
    random = np.random.default_rng(0)
    logits = (3 * random.normal(size=(ROWS, VOCABULARY))).astype(np.float32)
    history = random.integers(0, VOCABULARY, (ROWS, 30))
    theirs = LogitsProcessorList(
        [THEIRS[name](options[name]) for name in THEIRS if name in options]
    )
    expected = theirs(torch.tensor(history), torch.tensor(logits.copy())).numpy()
    seen = np.zeros((ROWS, VOCABULARY), bool)
    np.put_along_axis(seen, history, True, axis=1)
    ours = jax.jit(filter_logits)(logits, Sampling(**options), seen)
    np.testing.assert_array_equal(np.isinf(ours), np.isinf(expected))
    if "temperature" in options:  # The largest logit is 0.
        expected -= expected.max(axis=1, keepdims=True)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_tokens_are_sampled_as_often_as_they_are_likely():
    logits, count = np.array([2.0, 1.0, 0.0, -1.0, -3.0], np.float32), 20_000
    keys = jax.random.split(jax.random.key(0), count)
    rows = jnp.broadcast_to(logits, (count, 5))
    drawn = choose_tokens(rows, Sampling(temperature=2.0, top_k=4), None, keys)
    frequencies = np.bincount(drawn, minlength=5) / count
    expected = scipy.special.softmax(logits[:4] / 2)
    np.testing.assert_allclose(frequencies[:4], expected, atol=0.015)
    assert frequencies[4] == 0


def test_without_a_temperature_the_likeliest_is_taken():
    logits = np.random.default_rng(0).normal(size=(ROWS, VOCABULARY)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), ROWS)
    tokens = choose_tokens(jnp.asarray(logits), Sampling(), None, keys)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-37, 1e-38, 1e-39, 1e-45, 5e-324])
def test_low_temperatures_take_the_likeliest(temperature):
    """Values below the range of float32 included."""
    logits = 50 * np.random.default_rng(0).normal(size=(ROWS, VOCABULARY)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), ROWS)
    for sampling in (Sampling(temperature=temperature), Sampling(temperature=temperature, top_p=1)):
        tokens = jax.jit(choose_tokens)(logits, sampling, None, keys)
        np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature=-1 must be a finite number, 0 or above"),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"temperature": float("inf")}, "temperature=inf must be a finite number"),
        ({"temperature": 1, "top_k": 0}, "top_k=0 must be an integer, at least 1"),
        ({"temperature": 1, "top_k": True}, "top_k=True must be an integer"),
        ({"temperature": 1, "top_p": 0}, "top_p=0 must be a number above 0 and at most 1"),
        ({"temperature": 1, "min_p": 1.5}, "min_p=1.5 must be a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be a finite number above 0"),
        ({"top_p": 0.9}, "top_p=0.9 has no effect without a temperature above 0"),
    ],
)
def test_impossible_values_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_do_sample_means_what_it_means_in_transformers():
    assert as_sampling(None, do_sample=False) == as_sampling(None) == Sampling()
    assert as_sampling(None, do_sample=True) == Sampling(temperature=1.0)
    assert as_sampling(None, do_sample=True, temperature=0.5) == Sampling(temperature=0.5)
    assert as_sampling(None, do_sample=True, temperature=0.0) == Sampling()
    with pytest.raises(ValueError, match=r"temperature=0.5 has no effect with do_sample=False"):
        as_sampling(None, do_sample=False, temperature=0.5)
    with pytest.raises(ValueError, match="sampling= and do_sample= were both given"):
        as_sampling(Sampling(), do_sample=True)
