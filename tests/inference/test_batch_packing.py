"""Packing texts into calls: every text once, in few shapes, with little padding."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np

from grit_jax.inference.batch_packing import plan_calls

lengths_of_texts = st.lists(st.integers(1, 3000), min_size=1, max_size=300)


@settings(deadline=None, max_examples=50)
@given(lengths=lengths_of_texts, num_shards=st.sampled_from([1, 8]))
def test_every_text_is_in_one_row_that_holds_it(lengths, num_shards):
    calls = plan_calls(lengths, num_shards, 8192)
    texts = [text for call in calls for row in call.rows for text in row]
    assert sorted(texts) == list(range(len(lengths)))
    for call in calls:
        assert all(sum(lengths[text] for text in row) <= call.row_length for row in call.rows)
        assert len(call.rows) <= call.num_rows
        assert call.num_rows % num_shards == 0
        assert call.num_rows // num_shards * call.row_length <= 8192
        assert sum(len(row) for row in call.rows) <= call.max_texts


def test_any_corpus_has_a_handful_of_shapes_and_little_padding():
    shapes = set()
    for seed in range(20):
        random = np.random.default_rng(seed)
        count = int(random.integers(1, 3000))
        lengths = np.clip(random.lognormal(4, 0.8, count), 1, 512).astype(int)
        calls = plan_calls(lengths.tolist(), 1, 8192)
        shapes |= {(call.num_rows, call.row_length) for call in calls}
        num_tokens = sum(call.num_rows * call.row_length for call in calls)
        if lengths.sum() > 16_384:
            assert lengths.sum() / num_tokens > 0.85
    assert len(shapes) <= 9


def test_one_short_text_takes_a_short_row():
    (call,) = plan_calls([20], 1, 8192)
    assert (call.num_rows, call.row_length) == (1, 64)
    (call,) = plan_calls([20], 8, 8192)
    assert (call.num_rows, call.row_length) == (8, 64)
