"""Requests that run together get the results that `GritLM` gives each of them."""

import concurrent.futures
import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grit_jax import GritLM
from grit_jax.inference.paged_programs import PagedPrograms
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.inference.results import NotFiniteError
from grit_jax.inference.sampling import (
    RowSampling,
    Sampling,
    choose_tokens,
    choose_tokens_by_row,
)
from grit_jax.inference.shared_gritlm import SharedGritLM

NEW = 20
ALL_OPTIONS = Sampling(temperature=0.9, top_k=200, top_p=0.95, min_p=0.001, repetition_penalty=1.2)
PROMPTS = [
    list(np.random.default_rng(length).integers(3, 32000, length))
    for length in (5, 1, 40, 120, 33, 64, 9)
]


@pytest.fixture(scope="module")
def shared(model):
    with SharedGritLM(model, cache_tokens=2048, max_running=4) as shared:
        shared.warm_up(4, 200, NEW)
        yield shared


def num_pages_used(shared):
    """Returns the pages in use after cancelled requests have been removed."""
    return shared.engine.run(lambda: shared.engine.scheduler.pool.num_used)


def in_threads(function, arguments):
    with concurrent.futures.ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(lambda each: function(*each), arguments))


@pytest.fixture(scope="module")
def expected(model):
    return model.generate(PROMPTS, NEW)


def assert_same_tokens(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_prompts_of_several_threads_are_continued_as_if_alone(shared, expected, count_compilations):
    with count_compilations() as compiled:
        found = in_threads(lambda prompt: shared.generate(prompt, NEW), [(p,) for p in PROMPTS])
    assert not compiled
    assert_same_tokens(found, expected)
    assert num_pages_used(shared) == 0


@pytest.mark.slow
def test_samples_do_not_depend_on_other_requests(model, shared, expected):
    options = {"sampling": ALL_OPTIONS, "seed": 2**32 - 1}
    calls = [({"first_index": index, **options}, prompt) for index, prompt in enumerate(PROMPTS)]
    calls.append(({}, PROMPTS[0]))  # Greedy, beside the others.
    found = in_threads(lambda options, prompt: shared.generate(prompt, NEW, **options), calls)
    assert_same_tokens(found, [*model.generate(PROMPTS, NEW, **options), expected[0]])


def test_embedding_and_scoring_take_turns_with_generation(model, shared):
    texts = ["bank", "A stream of water", "river " * 40] * 3
    calls = [
        lambda each: each.generate(PROMPTS, NEW),
        lambda each: each.encode_document(texts),
        lambda each: each.score(["The sky is", "One"], ["blue", "two"])[0],
        lambda each: each.chat([{"role": "user", "content": "Who?"}], NEW, stop="e"),
        lambda each: "".join(each.stream("Who are you?", NEW)),
    ]
    found = in_threads(lambda call: call(shared), [(call,) for call in calls])
    for call, ours in zip(calls, found, strict=True):
        jax.tree.map(
            lambda a, b: (
                np.testing.assert_allclose(a, b, atol=1e-5)
                if not isinstance(a, str)
                else a == b or pytest.fail(a)
            ),
            ours,
            call(model),
        )


def test_questions_share_the_cache_of_a_document(model, shared):
    _, caches = model.encode_document(["river " * 100, "bank"], get_cache=True)
    questions = [[5, 6], [7], [8, 9, 10], [11]]
    own_caches = [copy.copy(caches[0]) for _ in questions[:3]] + [caches[1]]
    expected = model.generate(questions, NEW, cache=own_caches)
    for _ in range(2):
        found = shared.generate(questions, NEW, cache=own_caches)
        assert_same_tokens(found, expected)
    # The first question leaves the document's pages; the others do not load it again.
    request = model._request([np.array(questions[0])], NEW, cache=[own_caches[1]])
    generation = shared.engine.submit(request, model._result(False, ()))
    generation.result()
    pool, content = shared.engine.scheduler.pool, generation.sequence.content
    assert [pool.holds(content(index, 32)) for index in range(3)] == [True] * 3
    wrong = dataclasses.replace(caches[0], keys=caches[0].keys[..., :8])
    with pytest.raises(
        InputError, match=r"^the cache of prompt 0 has 2 layers, 1 rows and 2 heads"
    ):
        shared.generate([5], NEW, cache=[wrong])


def test_the_youngest_waits_when_pages_run_out(model):
    prompts = [[number + 3] * 40 for number in range(7)]
    with SharedGritLM(model, cache_tokens=192, max_running=4) as small:
        found = small.generate(prompts, 60)
        assert small.engine.scheduler.num_preempted
        assert num_pages_used(small) == 0
        message = (
            "^prompt 0 needs 193 tokens of memory, with its cache and max_new_tokens=163, but "
            "there are 192"
        )
        with pytest.raises(InputError, match=message):
            small.generate([5] * 30, 163)
    assert_same_tokens(found, model.generate(prompts, 60))
    with pytest.raises(RuntimeError, match=r"^the engine is closed"):
        small.generate([5], 1)


def test_a_cancelled_request_frees_its_pages_at_once(shared, expected):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        others = pool.submit(shared.generate, PROMPTS, NEW)
        stream = shared.stream([5, 6, 7], 200)
        next(stream)
        stream.close()
        assert_same_tokens(others.result(), expected)
    assert num_pages_used(shared) == 0


def test_a_request_with_nan_does_not_disturb_the_others(model):
    broken = copy.deepcopy(model.model)
    broken.embedding[...] = broken.embedding[...].at[7].set(np.nan)
    others = [[token] * 40 for token in (5, 6, 8, 9, 10, 11, 12)]
    shared = SharedGritLM(GritLM(broken, model.mesh), cache_tokens=256, max_running=4)
    with shared, concurrent.futures.ThreadPoolExecutor(1) as pool:
        beside = pool.submit(shared.generate, others[:2], NEW)
        with pytest.raises(NotFiniteError, match="prompt 1"):
            shared.generate([[5], [7] * 40, [6]], NEW)
        found = [*beside.result(), *shared.generate(others[2:], NEW)]
    assert_same_tokens(found, model.generate(others, NEW))


def test_an_error_ends_the_requests_but_not_the_engine(shared, expected, monkeypatch):
    def decode(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(PagedPrograms, "decode", decode)
        with pytest.raises(MemoryError):
            shared.generate(PROMPTS, NEW)
    assert_same_tokens(shared.generate(PROMPTS, NEW), expected)


@pytest.mark.slow
def test_results_are_the_same_on_eight_devices(reference_model):
    one, eight = reference_model(), reference_model(on_eight_devices=True)
    vocab_size = one.model.config.vocab_size
    prompts = [[token % vocab_size for token in prompt] for prompt in PROMPTS[:3]]
    expected = one.generate(prompts, 8), one.encode(prompts)
    with SharedGritLM(eight, cache_tokens=512, max_running=4) as shared:
        calls = [(lambda: shared.generate(prompts, 8),), (lambda: shared.encode(prompts),)]
        tokens, embeddings = in_threads(lambda call: call(), calls)
    assert_same_tokens(tokens, expected[0])
    np.testing.assert_allclose(embeddings, expected[1], atol=1e-5)


def test_options_of_each_row_choose_the_same_tokens():
    rows = [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(repetition_penalty=1.5),
        Sampling(temperature=1e-30, top_k=100),
        Sampling(temperature=1.1, top_k=5, min_p=0.2),
        Sampling(temperature=0.9, top_p=0.6, repetition_penalty=0.7),
        ALL_OPTIONS,
        Sampling(temperature=2.0, top_p=1.0),
    ]
    generator = np.random.default_rng(0)
    logits = jnp.array(3 * generator.normal(size=(len(rows), 50)), jnp.float32)
    seen = jnp.array(generator.random((len(rows), 50)) < 0.3)
    by_row, for_one = jax.jit(choose_tokens_by_row), jax.jit(choose_tokens)
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed), len(rows))
        found = by_row(logits, RowSampling.stack(rows), seen, keys)
        expected = [
            int(for_one(logits[row][None], sampling, seen[row][None], keys[row][None])[0])
            for row, sampling in enumerate(rows)
        ]
        assert found.tolist() == expected
