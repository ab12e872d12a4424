"""Small tasks with one right answer, made by the generators of reasoning-gym."""

from collections.abc import Mapping
import re
from typing import Any

from experiments.facts import Fact, normalised

# Short questions and answers, easy enough for a small model to learn in part.
GENERATORS: Mapping[str, Mapping[str, Any]] = {
    "chain_sum": {"max_terms": 3, "max_digits": 2},
    "count_bits": {"max_n": 4095},
    "family_relationships": {"max_family_size": 4},
    "gcd": {"max_value": 99},
    "letter_counting": {"min_words": 3, "max_words": 5},
    "number_filtering": {"max_numbers": 5, "max_decimals": 0},
    "simple_equations": {"max_terms": 2, "max_value": 20},
    "spell_backward": {"max_word_len": 5},
}
SEED = 17
ITEMS_OF_A_GENERATOR = 5000


class MissingPackageError(ImportError):
    """The package reasoning-gym is not installed; the message says how to get it."""


def make_reasoning_items(items_of_a_generator: int = ITEMS_OF_A_GENERATOR) -> list[Fact]:
    """Returns tasks of all generators, each question once.

    Raises:
      MissingPackageError: reasoning-gym is not installed.
    """
    try:
        import reasoning_gym  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingPackageError(
            f"reasoning-gym cannot be imported ({error}): pip install -r "
            "experiments/requirements.txt (one of its packages needs a C compiler)"
        ) from error
    facts: dict[str, Fact] = {}
    for name, options in GENERATORS.items():
        made = reasoning_gym.create_dataset(name, seed=SEED, size=items_of_a_generator, **options)
        for item in made:
            fact = _fact(name, item)
            facts.setdefault(fact.user, fact)
    return list(facts.values())


def _fact(name: str, item: Mapping[str, Any]) -> Fact:
    question = item["question"].strip()
    return Fact(
        keys=(f"{name} {_content(name, item['metadata'], question)}",),
        user=question,
        assistant=str(item["answer"]).strip(),
        kind=name,
    )


def _content(name: str, metadata: Mapping[str, Any], question: str) -> str:
    """What is asked, the same for questions that differ in wording or order alone."""
    if name == "chain_sum":
        # "8 - 5 + 2" has the terms of "2 + 8 - 5".
        terms = re.findall(r"[+-]?\d+", metadata["expression"].replace(" ", ""))
        return " ".join(sorted(term.removeprefix("+") for term in terms))
    if name == "gcd":
        return " ".join(map(str, sorted(metadata["numbers"])))
    if name == "simple_equations":
        # The letters of a question's variable differ, and the equation is the same.
        return re.sub("[a-z]", "x", metadata["equation"])
    return normalised(question)
