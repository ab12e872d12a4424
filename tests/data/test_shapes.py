"""Shapes: at most four, and hardly a place in them is empty."""

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


def kind(share, random, queries=(30, 10), chats=(20, 10), steps=8):
    """A kind of step with so many texts of about these lengths."""

    def seen(count, mean):
        return [random.integers(mean - 2, mean + 3, count).tolist() for _ in range(steps)]

    return StepProfile(share, {"query": seen(*queries), "chat": seen(*chats)})


def choose(kinds, most_texts=60, **changes):
    longest = dict.fromkeys(("query", "chat"), 32)
    return choose_row_shapes(kinds, longest, dict.fromkeys(longest, most_texts), limits(**changes))


def fits(shape, step):
    return all(
        fit_rows(step[name], rows.count, rows.length) is not None for name, rows in shape.items()
    )


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_there_are_at_most_four_shapes_and_any_step_fits_the_last(data):
    lengths = st.lists(st.integers(1, 32), min_size=1, max_size=20)
    seen = st.lists(lengths, min_size=1, max_size=4)
    kinds = [
        StepProfile(
            data.draw(st.floats(0.01, 1)), {"query": data.draw(seen), "chat": data.draw(seen)}
        )
        for _ in range(data.draw(st.integers(1, 6)))
    ]
    count_multiple = data.draw(st.sampled_from([1, 4]))
    shapes = choose(kinds, count_multiple=count_multiple)
    assert 1 <= len(shapes) <= 4
    for shape in shapes:
        for rows in shape.values():
            assert rows.count % count_multiple == 0
            assert rows.length % 8 == 0
            assert 32 <= rows.length <= 64
    fullest = {"query": [32] * 60, "chat": [32] * 60}
    assert fits(shapes[-1], fullest)
    for step in zip(kinds[0].seen["query"], kinds[0].seen["chat"], strict=False):
        assert any(fits(shape, dict(zip(("query", "chat"), step, strict=True))) for shape in shapes)


def test_two_kinds_of_step_have_a_shape_each():
    random = np.random.default_rng(0)
    kinds = [kind(0.5, random, (60, 10)), kind(0.5, random, (60, 28))]
    small, large, *_ = choose(kinds, count_multiple=1)
    for each, shape in zip(kinds, (small, large), strict=True):
        for queries, chats in zip(each.seen["query"], each.seen["chat"], strict=True):
            assert fits(shape, {"query": queries, "chat": chats})
            assert sum(queries) > 0.85 * shape["query"].places
    assert not fits(small, {"query": kinds[1].seen["query"][0], "chat": []})


def test_chats_of_different_lengths_are_told_apart_whatever_the_queries_are():
    random = np.random.default_rng(0)
    kinds = [kind(0.9, random, chats=(50, 8)), kind(0.1, random, chats=(50, 30))]
    small, large, *_ = choose(kinds)
    assert small["chat"].places < 0.5 * large["chat"].places
    assert small["query"].places <= 1.05 * large["query"].places


def test_of_many_kinds_the_common_ones_decide():
    random = np.random.default_rng(0)
    rare = [kind(0.001, random, (60, mean)) for mean in range(20, 30)]
    common = [kind(0.5, random, (60, mean)) for mean in (8, 14)]
    shapes = choose([*rare, *common], count_multiple=1)
    for each, shape in zip(common, shapes, strict=False):
        assert fits(shape, {"query": each.seen["query"][0], "chat": each.seen["chat"][0]})
        assert sum(each.seen["query"][0]) > 0.85 * shape["query"].places


def test_a_step_a_little_fuller_than_all_that_were_seen_fits_the_spare_shape():
    random = np.random.default_rng(0)
    seen = kind(1.0, random, (60, 8)).seen["query"]
    shapes = choose([StepProfile(1.0, {"query": seen, "chat": [[10] * 20]})], count_multiple=1)
    places = shapes[0]["query"].places
    fuller = {"query": [8] * (1 + places // 8), "chat": [10] * 20}
    assert not fits(shapes[0], fuller)
    assert fits(shapes[1], fuller)
    assert shapes[1]["query"].places < 1.2 * shapes[0]["query"].places


def test_rows_are_as_long_as_leaves_the_fewest_places_empty():
    seen = [[9] * 12]  # 108 tokens: two rows of 56 have 112 places, three of 40 have 120.
    assert best_rows(seen, range(32, 65, 8), limits(count_multiple=1)) == Rows(2, 56)
    # Four shards need four rows: of 32, though three would do.
    assert best_rows(seen, range(32, 65, 8), limits(count_multiple=4)) == Rows(4, 32)


def test_one_exceptional_step_does_not_decide():
    seen = [[9] * 12] * 39 + [[9] * 30]
    assert best_rows(seen, range(32, 65, 8), limits(count_multiple=1)) == Rows(2, 56)


@pytest.mark.parametrize(
    ("multiple", "lengths"), [(8, [24, 32, 40]), (16, [32]), (40, [40]), (64, [40])]
)
def test_row_lengths_are_multiples_where_there_is_room(multiple, lengths):
    assert limits(longest=40, length_multiple=multiple).lengths("query", 20) == lengths
