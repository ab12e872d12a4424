"""Training facts never overlap with held-out facts, whatever they share."""

import itertools
import random

import pytest

from experiments.facts import Dataset, Fact
from experiments.split import Texts, split_facts

DATASETS = (
    Dataset("terms", "entries", "Find it", held_out=1 / 4, most_queries=30),
    Dataset("other", "entries", "Find it", held_out=1 / 8, most_queries=30),
    Dataset("sums", "", "", held_out=1 / 5, most_chats=20),
)
WORDS = [f"{first}{second}" for first in "bdfgklmnprst" for second in ("a", "an", "ib", "oz")]


def fact(rng: random.Random, *keys: str, **changes) -> Fact:
    """A fact of random texts; with few words, many texts contain each other."""

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS[:12], k=rng.randint(low, high)))

    told = {
        "query": f"{keys[0]}: {text(4, 8)}",
        "passage": text(3, 9),
        "negatives": tuple(text(3, 5) for _ in range(rng.randint(0, 2))),
    }
    told |= {"user": f"What is {told['query']}?", "assistant": told["passage"]} | changes
    return Fact(keys=tuple(f"term {key}" for key in keys), **told)


@pytest.fixture(params=range(3))
def facts(request) -> dict[str, list[Fact]]:
    rng = random.Random(request.param)
    keys = [f"key{number}" for number in range(150)]
    return {
        "terms": [fact(rng, *rng.sample(keys, rng.randint(1, 2))) for _ in range(80)],
        "other": [fact(rng, rng.choice(keys)) for _ in range(200)],
        "sums": [
            Fact(keys=(f"sum {number}",), user=f"Add {number} to 3 and 4", assistant="7")
            for number in range(100)
        ],
    }


def texts_of(one: Fact) -> list[str]:
    return [one.query, one.passage, *one.negatives, one.user, one.assistant]


def all_facts(facts: dict[str, list[Fact]]) -> list[Fact]:
    return [one for own in facts.values() for one in own]


def test_training_has_no_held_out_key_or_text(facts):
    split = split_facts(facts, DATASETS)
    train, held_out = all_facts(split.train), all_facts(split.held_out)
    assert len(train) > 100
    assert len(held_out) > 40
    keys = {key for one in train for key in one.keys}
    assert not keys & {key for one in held_out for key in one.keys}
    trained_on = [
        f" {text.replace(':', '').replace('?', '')} " for one in train for text in texts_of(one)
    ]
    for one in held_out:
        for text in filter(None, (one.passage, *one.negatives, one.query.partition(": ")[2])):
            assert not any(f" {text} " in longer for longer in trained_on)


def test_facts_that_share_keys_through_others_are_in_one_split():
    rng = random.Random(0)
    for number in range(40):
        names = [f"{number}{letter}" for letter in "abcd"]
        chain = [fact(rng, one, other) for one, other in itertools.pairwise(names)]
        facts = {"terms": chain[:1], "other": chain[1:], "sums": []}
        split = split_facts(facts, DATASETS)
        assert not (all_facts(split.train) and all_facts(split.held_out))


def test_held_out_counts_and_remaining_facts():
    rng = random.Random(1)
    unlike = {"query": "", "passage": "", "negatives": ()}
    many = [
        fact(rng, f"key{n}", **unlike, user=f"question {n} of all", assistant=f"{n}")
        for n in range(4000)
    ]
    datasets = (Dataset("terms", "entries", "", held_out=1 / 4, most_queries=5000),)
    split = split_facts({"terms": many}, datasets)
    assert 900 < len(split.held_out["terms"]) < 1100
    assert len(split.train["terms"]) + len(split.held_out["terms"]) == 4000
    few = (Dataset("terms", "entries", "", held_out=1 / 4, most_queries=10),)
    fewer = split_facts({"terms": many}, few)
    assert fewer.held_out["terms"] == split.held_out["terms"][:10]
    # Held-out facts beyond the maximum are not trained on either.
    assert fewer.train == split.train


def test_the_split_does_not_depend_on_the_order_of_the_facts(facts):
    turned = {name: own[::-1] for name, own in reversed(facts.items())}
    split, again = split_facts(facts, DATASETS), split_facts(turned, DATASETS)
    for name in facts:
        assert split.held_out[name] == again.held_out[name]
        assert split.train[name] == again.train[name]


def test_held_out_queries_and_passages_are_all_different(facts):
    doubled = {name: own + own for name, own in facts.items()}
    split = split_facts(doubled, DATASETS)
    for one in ("query", "passage"):
        texts = [getattr(each, one) for each in split.held_out["terms"]]
        assert len(set(texts)) == len(texts)


def test_texts_are_found_within_others_by_words():
    texts = Texts(["Sloping land, beside a river", "too short", "a b c"])
    assert texts.found_in("The (sloping) LAND beside a river's bank").strip() == (
        "sloping land beside a river"
    )
    assert texts.found_in("a b cd") is None
    assert texts.found_in("too short") is None
    assert texts.found_in("sloping land beside the river") is None
    assert texts.found_in("xa b c; a b c") is not None
