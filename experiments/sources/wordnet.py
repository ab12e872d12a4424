"""WordNet 3.0: a word in a sentence, and its definition there."""

from pathlib import Path

from experiments.facts import Fact
from tools.sample.build import WORDNET_QUESTIONS
from tools.sample.text import pick, stable_number, term_key
from tools.sample.wordnet import SensePair, find_pairs, read_wordnet

MOST_NEGATIVES = 8
# One chat in this many asks for a sentence instead of a definition.
SENTENCE_ONE_IN = 4
SENTENCE_TASKS = (
    'Use the word "{word}" in a sentence, where it means: {definition}',
    'Write a sentence with "{word}" in the sense of: {definition}',
    'Give an example of "{word}" when it means: {definition}',
)


def read_senses(folder: Path) -> list[Fact]:
    """Returns a fact for each example sentence of a word that has at least two senses."""
    pairs = {(pair.word, pair.sentence): pair for pair in read_pairs(folder)}
    return [_fact(pair) for pair in pairs.values()]


def read_pairs(folder: Path) -> list[SensePair]:
    """Returns words in sentences, without sentences listed for two senses of their word."""
    pairs = find_pairs(read_wordnet(folder), MOST_NEGATIVES)
    senses: dict[tuple[str, str], set[str]] = {}
    for pair in pairs:
        senses.setdefault((pair.word.lower(), pair.sentence), set()).add(pair.definition)
    return [pair for pair in pairs if len(senses[pair.word.lower(), pair.sentence]) == 1]


def _fact(pair: SensePair) -> Fact:
    query = f"{pair.word}: {pair.sentence}"
    if stable_number("sentence " + query) % SENTENCE_ONE_IN == 0:
        task = pick(SENTENCE_TASKS, query)
        chat = task.format(word=pair.word, definition=pair.definition), pair.sentence
    else:
        question = pick(WORDNET_QUESTIONS, query)
        chat = question.format(word=pair.word, sentence=pair.sentence), pair.definition
    return Fact(
        keys=(f"term {term_key(pair.word)}",),
        user=chat[0],
        assistant=chat[1],
        query=query,
        passage=pair.definition,
        negatives=pair.other_definitions,
        kind="sentence" if chat[1] == pair.sentence else "definition",
    )
