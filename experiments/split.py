"""Splits facts so that neither stream trains on held-out facts."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses

from experiments.facts import Dataset, Fact, normalize_words
from tools.sample.text import stable_number

Facts = dict[str, list[Fact]]
# Shorter texts occur everywhere and carry no information.
MIN_WORDS = 3


@dataclasses.dataclass(frozen=True)
class Split:
    """The facts of each dataset, by name, in a fixed pseudorandom order."""

    train: Facts
    held_out: Facts


def split_facts(facts: Mapping[str, Sequence[Fact]], datasets: Sequence[Dataset]) -> Split:
    """Splits facts into training and held-out facts.

    Facts that share keys, directly or through others, are in one split, chosen by the hash of their
    smallest key. Training facts that contain a text of a held-out fact are removed, and so are such
    negatives.
    """
    sides = _Sides(facts, {dataset.name: dataset.held_out for dataset in datasets})
    held_out = {
        dataset.name: _choose_held_out(
            [fact for fact in facts[dataset.name] if sides.is_held_out(fact)], dataset
        )
        for dataset in datasets
    }
    secret = Texts(text for chosen in held_out.values() for fact in chosen for text in told(fact))
    train = {
        name: list(_without(secret, [fact for fact in own if not sides.is_held_out(fact)]))
        for name, own in facts.items()
    }
    return Split({name: _shuffled(own) for name, own in train.items()}, held_out)


class Texts:
    """A set of texts to search for in other texts, compared by words only."""

    def __init__(self, texts: Iterable[str]):
        self._by_start: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for text in texts:
            form = normalize_words(text)
            words = tuple(form.split())
            if len(words) >= MIN_WORDS:
                self._by_start[words[:MIN_WORDS]].add(form)

    def found_in(self, text: str) -> str | None:
        """Returns one of the texts that `text` contains, or None."""
        form = normalize_words(text)
        words = form.split()
        starts = zip(*(words[offset:] for offset in range(MIN_WORDS)), strict=False)
        for start in starts:
            for wanted in self._by_start.get(start, ()):
                if wanted in form:
                    return wanted
        return None


def told(fact: Fact) -> Iterator[str]:
    """Yields the texts that training must not contain if the fact is held out.

    Tasks without a passage, such as sums, have none: the key covers them, and a longer sum may
    start with the same terms.
    """
    if fact.passage:
        yield from (fact.passage, fact.unmasked, *fact.negatives, fact.user, fact.assistant)
        yield query_text(fact.query, fact.keys)


def query_text(query: str, keys: Sequence[str]) -> str:
    """Returns the query, or only the sentence if the query is a term in a sentence.

    Other texts may mention the term; its key ensures that no training fact asks about it.
    """
    is_term = keys[0].startswith("term ")
    return query.partition(": ")[2] if is_term else query


class _Sides:
    """Assigns keys to splits by connected components of keys that share a fact."""

    def __init__(self, facts: Mapping[str, Sequence[Fact]], shares: Mapping[str, float]):
        self._parents: dict[str, str] = {}
        self._shares: dict[str, float] = defaultdict(float)
        for own in facts.values():
            for fact in own:
                for key in fact.keys:
                    self._join(fact.keys[0], key)
        for name, own in facts.items():
            for fact in own:
                root = self._root(fact.keys[0])
                self._shares[root] = max(self._shares[root], shares[name])

    def is_held_out(self, fact: Fact) -> bool:
        root = self._root(fact.keys[0])
        return stable_number("held out " + root) < self._shares[root] * 2**64

    def _root(self, key: str) -> str:
        """Returns the smallest key of the component."""
        root = self._parents.setdefault(key, key)
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[key] != root:
            self._parents[key], key = root, self._parents[key]
        return root

    def _join(self, one: str, other: str) -> None:
        first, second = sorted((self._root(one), self._root(other)))
        self._parents[second] = first


def _choose_held_out(facts: Sequence[Fact], dataset: Dataset) -> list[Fact]:
    """Returns held-out facts without repeated queries, passages or questions."""
    most = dataset.most_queries if dataset.passages else dataset.most_chats
    chosen: list[Fact] = []
    seen: set[str] = set()
    for fact in _shuffled(facts):
        texts = {normalize_words(text) for text in (fact.query, fact.passage, fact.user) if text}
        if len(chosen) < most and not seen & texts:
            seen |= texts
            chosen.append(fact)
    return chosen


def _without(secret: Texts, facts: Iterable[Fact]) -> Iterator[Fact]:
    for fact in facts:
        negatives = tuple(text for text in fact.negatives if secret.found_in(text) is None)
        own = (fact.query, fact.passage, fact.user, fact.assistant)
        if all(secret.found_in(text) is None for text in own):
            yield dataclasses.replace(fact, negatives=negatives)


def _shuffled(facts: Iterable[Fact]) -> list[Fact]:
    return sorted(facts, key=lambda fact: (stable_number(f"order {fact.user}"), fact.user))
