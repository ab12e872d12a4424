"""Shapes: at most four, with little padding."""

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from grit_jax.data.packing import fit_rows
from grit_jax.data.shapes import RowLimits, Rows, StepProfile, best_rows, choose_row_shapes


def limits(longest=64, length_multiple=8, count_multiple=4):
    return RowLimits(
        longest={"query": longest, "chat": longest},
        length_multiple=length_multiple,
        count_multiple=count_multiple,
    )


def profile(share, random, queries=(30, 10), chats=(20, 10), steps=8):
    """A profile of steps with these numbers of texts and mean lengths."""

    def lengths(count, mean):
        return [random.integers(mean - 2, mean + 3, count).tolist() for _ in range(steps)]

    return StepProfile(share, {"query": lengths(*queries), "chat": lengths(*chats)})


def choose(profiles, num_texts=60, **changes):
    longest = dict.fromkeys(("query", "chat"), 32)
    num_texts = dict.fromkeys(longest, num_texts)
    return choose_row_shapes(profiles, longest, num_texts, limits(**changes))


def fits(shape, step):
    return all(
        fit_rows(step[name], rows.count, rows.length) is not None for name, rows in shape.items()
    )


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_there_are_at_most_four_shapes_and_any_step_fits_the_last(data):
    lengths = st.lists(st.integers(1, 32), min_size=1, max_size=20)
    steps = st.lists(lengths, min_size=1, max_size=4)
    profiles = [
        StepProfile(
            data.draw(st.floats(0.01, 1)), {"query": data.draw(steps), "chat": data.draw(steps)}
        )
        for _ in range(data.draw(st.integers(1, 6)))
    ]
    count_multiple = data.draw(st.sampled_from([1, 4]))
    shapes = choose(profiles, count_multiple=count_multiple)
    assert 1 <= len(shapes) <= 4
    for shape in shapes:
        for rows in shape.values():
            assert rows.count % count_multiple == 0
            assert rows.length % 8 == 0
            assert 32 <= rows.length <= 64
    fullest = {"query": [32] * 60, "chat": [32] * 60}
    assert fits(shapes[-1], fullest)
    for step in zip(*profiles[0].lengths.values(), strict=False):
        assert any(fits(shape, dict(zip(("query", "chat"), step, strict=True))) for shape in shapes)


def test_two_profiles_have_a_shape_each():
    random = np.random.default_rng(0)
    profiles = [profile(0.5, random, (60, 10)), profile(0.5, random, (60, 28))]
    small, large, *_ = choose(profiles, count_multiple=1)
    for each, shape in zip(profiles, (small, large), strict=True):
        for queries, chats in zip(*each.lengths.values(), strict=True):
            assert fits(shape, {"query": queries, "chat": chats})
            assert sum(queries) > 0.85 * shape["query"].capacity
    assert not fits(small, {"query": profiles[1].lengths["query"][0], "chat": []})


def test_chats_of_different_lengths_are_told_apart_whatever_the_queries_are():
    random = np.random.default_rng(0)
    profiles = [profile(0.9, random, chats=(50, 8)), profile(0.1, random, chats=(50, 30))]
    small, large, *_ = choose(profiles)
    assert small["chat"].capacity < 0.5 * large["chat"].capacity
    assert small["query"].capacity <= 1.05 * large["query"].capacity


def test_the_common_profiles_decide():
    random = np.random.default_rng(0)
    rare = [profile(0.001, random, (60, mean)) for mean in range(20, 30)]
    common = [profile(0.5, random, (60, mean)) for mean in (8, 14)]
    shapes = choose([*rare, *common], count_multiple=1)
    for each, shape in zip(common, shapes, strict=False):
        assert fits(shape, {"query": each.lengths["query"][0], "chat": each.lengths["chat"][0]})
        assert sum(each.lengths["query"][0]) > 0.85 * shape["query"].capacity


def test_a_step_slightly_larger_than_all_steps_seen_fits_the_spare_shape():
    random = np.random.default_rng(0)
    queries = profile(1.0, random, (60, 8)).lengths["query"]
    shapes = choose([StepProfile(1.0, {"query": queries, "chat": [[10] * 20]})], count_multiple=1)
    capacity = shapes[0]["query"].capacity
    larger = {"query": [8] * (1 + capacity // 8), "chat": [10] * 20}
    assert not fits(shapes[0], larger)
    assert fits(shapes[1], larger)
    assert shapes[1]["query"].capacity < 1.2 * shapes[0]["query"].capacity


def test_the_row_length_with_the_least_padding_is_chosen():
    steps = [[9] * 12]  # 108 tokens: two rows of 56 hold 112, three rows of 40 hold 120.
    assert best_rows(steps, range(32, 65, 8), limits(count_multiple=1)) == Rows(2, 56)
    # Four shards need four rows, although three rows of 40 would hold the tokens.
    assert best_rows(steps, range(32, 65, 8), limits(count_multiple=4)) == Rows(4, 32)


def test_one_exceptional_step_does_not_decide():
    steps = [[9] * 12] * 39 + [[9] * 30]
    assert best_rows(steps, range(32, 65, 8), limits(count_multiple=1)) == Rows(2, 56)


@pytest.mark.parametrize(
    ("multiple", "lengths"), [(8, [24, 32, 40]), (16, [32]), (40, [40]), (64, [40])]
)
def test_row_lengths_are_multiples_where_there_is_room(multiple, lengths):
    assert limits(longest=40, length_multiple=multiple).lengths("query", 20) == lengths
