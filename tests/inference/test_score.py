"""Scores equal the sums of log-probabilities, and do not depend on the other pairs."""

import functools
from pathlib import Path
import tempfile

from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizer_files import write_tokenizer

from grit_jax.inference.prompt_encoder import InputError, PromptEncoder
from grit_jax.inference.score import Scorer, as_continuations
from grit_jax.text.tokenizer import Tokenizer

PROMPT = "The capital of France is"


@nnx.jit
def logits_of(module, tokens):
    return module.logits(module(tokens, is_causal=True))[0]


def by_logits(model, prompt, continuation):
    """Returns the log-likelihood of a pair of token ids on its own, and whether it is greedy."""
    tokens = [*prompt, *continuation]
    padded = np.pad(tokens, (0, -len(tokens) % 96))  # Attention is causal.
    before = logits_of(model.model, padded[None])[len(prompt) - 1 : len(tokens) - 1]
    chances = jax.nn.log_softmax(before, axis=-1)
    own = chances[jnp.arange(len(continuation)), jnp.asarray(continuation)]
    return float(own.sum()), bool((before.argmax(-1) == jnp.asarray(continuation)).all())


ids = st.lists(st.integers(3, 300), min_size=1, max_size=40)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=6), st.integers(0, 5))
def test_scores_are_the_logits_own_whatever_is_beside(reference_model, pairs, copies):
    model = reference_model()
    # Continuations that differ only in their last token share one input.
    pairs += [(prompt, [*rest[:-1], (rest[-1] + 1) % 300]) for prompt, rest in pairs[:copies]]
    values, are_greedy = model.score(*zip(*pairs, strict=True))
    for (prompt, rest), value, is_greedy in zip(pairs, values, are_greedy, strict=True):
        expected, greedy = by_logits(model, prompt, rest)
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert is_greedy == greedy


@pytest.mark.parametrize("architecture", ["mistral", "mixtral"])
def test_what_is_generated_is_greedy(reference_model, architecture):
    model = reference_model(architecture)
    prompt = np.arange(5, 17)
    made = model.generate(prompt, max_new_tokens=9)
    assert len(made) > 1
    other = np.array([*made[:-1], (made[-1] + 1) % 300])
    values, are_greedy = model.score([prompt] * 2, [made, other])
    assert are_greedy.tolist() == [True, False] and values[0] > values[1]


def test_no_hidden_state_is_copied_for_each_of_many_continuations(reference_model):
    model = reference_model()
    scorer = Scorer(model.model, model.mesh)

    def temporary_bytes(num_targets):
        rows, targets = np.zeros((2, 64), np.int32), np.zeros((2, num_targets), np.int32)
        program = scorer.program.lower(scorer.parameters, *[rows] * 3, targets, targets).compile()
        return program.memory_analysis().temp_size_in_bytes

    # A hidden state has 32 numbers of 4 bytes.
    more = temporary_bytes(8192) - temporary_bytes(4096)
    assert more < 2 * 4096 * 32 * 4


def test_a_strings_tokens_are_those_of_the_whole(model):
    tokenizer = model.tokenizer
    values, _ = model.score([PROMPT, PROMPT], [" Paris.", " Rome, of course"])
    for continuation, value in zip([" Paris.", " Rome, of course"], values, strict=True):
        prompt = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
        whole = [tokenizer.bos_id, *tokenizer.encode(PROMPT + continuation)]
        assert value == pytest.approx(by_logits(model, prompt, whole[len(prompt) :])[0], rel=1e-5)


@functools.cache
def bytes_tokenizer():
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer(str(write_tokenizer(Path(folder), "gpt2")))


STRINGS = st.text("abst 12\n.é", min_size=1, max_size=12)


@settings(deadline=None)
@given(STRINGS.filter(str.strip), STRINGS, st.booleans())
def test_every_character_of_a_continuation_is_scored_once(prompt, continuation, is_bytes):
    tokenizer = bytes_tokenizer() if is_bytes else Tokenizer()
    encoder = PromptEncoder(tokenizer, tokenizer.vocab_size)
    (pair,) = as_continuations(encoder, [prompt], [continuation], 700, add_bos=True)
    whole = [*pair.prompt, *pair.tokens]
    assert whole == [tokenizer.bos_id, *tokenizer.encode(prompt + continuation)]
    read = tokenizer.decode(pair.prompt[1:].tolist())
    # The prompt's tokens are its beginning, without a token that it shares with the continuation.
    assert prompt.encode().startswith(read.removesuffix("\ufffd").encode())
    assert len(pair.tokens)


@pytest.mark.parametrize(
    ("prompt", "continuation", "scored"),
    [
        ("a", "b", ["▁ab"]),
        ("The ab", "stract", ["▁abstract"]),
        ("The ab", "stract idea", ["▁abstract", "▁idea"]),
        ("The capital is ", "Paris", ["▁Paris"]),
        ("The capital is", " Paris", ["▁Paris"]),
    ],
)
def test_a_token_of_prompt_and_continuation_is_scored(model, prompt, continuation, scored):
    tokenizer = model.tokenizer
    whole = [tokenizer.bos_id, *tokenizer.encode(prompt + continuation)]
    assert tokenizer.decode(whole[-len(scored) :]) == "".join(scored).replace("▁", " ").strip()
    expected, _ = by_logits(model, whole[: -len(scored)], whole[-len(scored) :])
    values, _ = model.score([prompt], [continuation])
    assert values[0] == pytest.approx(expected, rel=1e-5)


def test_scores_on_a_mesh_are_those_of_one_device(reference_model):
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(3, 300, 20), rng.integers(3, 300, n)) for n in (1, 50, 7)]
    one = reference_model().score(*zip(*pairs, strict=True))
    eight = reference_model(on_eight_devices=True).score(*zip(*pairs, strict=True))
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "continuations", "message"),
    [
        ("A prompt", ["a"], "prompts are of type str: give a list"),
        ([PROMPT], ["a", "b"], "2 continuations for 1 prompts"),
        ([PROMPT], [[5, 6]], "continuation 0 must both be strings"),
        ([PROMPT], [""], "continuation 0 adds no token to its prompt"),
        ([""], ["a"], "prompt 0 is empty"),
        ([[5, 6]], [[5] * 700], "continuation 0 have 702 tokens, but this model supports 700"),
        ([], [], "no prompts were given"),
        (["a", "b"], ["c", "\ud83d"], "continuation 1 has half of a surrogate pair"),
    ],
)
def test_invalid_pairs_are_named(model, prompts, continuations, message):
    with pytest.raises(InputError, match=message):
        model.score(prompts, continuations)


def test_a_token_before_which_nothing_stands_cannot_be_scored(model):
    with pytest.raises(InputError, match="prompt and continuation 0 begin with the same token"):
        model.score(["a"], ["b"], add_special_tokens=False)
