"""Reads WordNet 3.0's database files and pairs words in example sentences with their senses."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
import re
from typing import TypeVar

from tools.sample.text import clean, count_words, is_welcome

Parsed = TypeVar("Parsed")

# Short texts, so that many fit into the sample.
SENTENCE_WORDS = range(4, 17)
DEFINITION_WORDS = range(3, 25)

# The file of each part of speech, and the letter that stands for it in the database.
_FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
# WordNet's rules of detachment: an ending and what stands in its place in the base form.
_ENDINGS = {
    "n": [("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
          ("men", "man"), ("ies", "y")],
    "v": [("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""),
          ("ing", "e"), ("ing", "")],
    "a": [("er", ""), ("est", ""), ("er", "e"), ("est", "e")],
    "r": [],
}  # fmt: skip


@dataclass(frozen=True)
class Synset:
    """One meaning: its words, its definition ("" if unusable) and sentences that use a word."""

    lemmas: tuple[str, ...]
    definition: str
    sentences: tuple[str, ...]


@dataclass
class WordNet:
    """The parts of the database that the sample needs."""

    # By part of speech and offset in that part's data file.
    synsets: dict[tuple[str, int], Synset] = field(default_factory=dict)
    # By lower-case lemma and part of speech: the synsets' offsets, the commonest sense first.
    senses: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    # By part of speech: the base forms of an irregular form.
    exceptions: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    # By lower-case lemma: how often any of its senses was tagged in the semantic concordances.
    tag_counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SensePair:
    """A word in a sentence, what it means there and what it means elsewhere."""

    word: str
    sentence: str
    definition: str
    other_definitions: tuple[str, ...]
    tag_count: int


def read_wordnet(folder: Path) -> WordNet:
    """Reads the database from the folder with ``data.noun``, ``index.noun`` and so on."""
    wordnet = WordNet()
    for letter, name in _FILES.items():
        for offset, synset in _parsed(folder / f"data.{name}", parse_synset):
            if synset.definition:
                wordnet.synsets[letter, offset] = synset
        for lemma, offsets in _parsed(folder / f"index.{name}", _parse_index):
            wordnet.senses[lemma, letter] = offsets
        wordnet.exceptions[letter] = dict(_parsed(folder / f"{name}.exc", _parse_exception))
    tag_counts: Counter[str] = Counter()
    for lemma, count in _parsed(folder / "cntlist.rev", _parse_tag_count):
        tag_counts[lemma] += count
    wordnet.tag_counts = dict(tag_counts)
    return wordnet


def parse_synset(line: str) -> tuple[int, Synset]:
    """The offset and the synset of one line of a data file."""
    record, separator, gloss = line.partition(" | ")
    if not separator:
        raise ValueError("there is no gloss")
    fields = record.split(" ")
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    # An adjective may carry a marker of where it can stand, such as "asleep(p)".
    lemmas = tuple(re.sub(r"\([a-z]+\)$", "", word).replace("_", " ") for word in words)
    definition, sentences = split_gloss(gloss)
    return int(fields[0]), Synset(lemmas, definition, tuple(sentences))


def split_gloss(gloss: str) -> tuple[str, list[str]]:
    """Splits ``definition; "sentence"; "sentence"``; the definition is "" if it is unusable."""
    before, quote, after = clean(gloss).partition('"')
    definition = before.rstrip(" ;:,")
    quotes_belong_to_definition = bool(quote) and not before.rstrip().endswith((";", ":", ","))
    outside_parentheses = re.sub(r"\([^()]*\)", "", definition)
    if quotes_belong_to_definition or re.search("[()]", outside_parentheses):
        return "", []
    if count_words(outside_parentheses) == 0:
        return "", []
    pieces = (quote + after).split('"')
    # An odd number of quotation marks makes it unclear what is quoted.
    sentences = pieces[1::2] if len(pieces) % 2 else []
    return definition, [clean(sentence) for sentence in sentences]


def find_pairs(wordnet: WordNet, most_negatives: int) -> list[SensePair]:
    """All usable pairs of words that have at least one other sense, in a stable order."""
    pairs = []
    for (part_of_speech, offset), synset in sorted(wordnet.synsets.items()):
        for sentence in synset.sentences:
            lemma = _lemma_in(sentence, synset, part_of_speech, wordnet)
            if lemma is None or count_words(sentence) not in SENTENCE_WORDS:
                continue
            others = _other_definitions(wordnet, lemma, part_of_speech, offset)
            count = wordnet.tag_counts.get(lemma.lower(), 0)
            pair = SensePair(lemma, sentence, synset.definition, others[:most_negatives], count)
            if others and _is_usable(synset.definition) and is_welcome(sentence):
                pairs.append(pair)
    return pairs


def base_forms(form: str, part_of_speech: str, exceptions: dict[str, list[str]]) -> set[str]:
    """What the form may be an inflection of, itself included."""
    bases = {form, *exceptions.get(form, [])}
    for ending, replacement in _ENDINGS[part_of_speech]:
        if form.endswith(ending) and len(form) > len(ending) + 1:
            bases.add(form.removesuffix(ending) + replacement)
    return bases


def _lemma_in(sentence: str, synset: Synset, part_of_speech: str, wordnet: WordNet) -> str | None:
    """The lemma that the sentence uses: the longest, so that a phrase wins over its parts."""
    tokens = re.findall(r"[^\W_]+(?:['.-][^\W_]+)*", sentence.lower())
    tokens = [token.removesuffix("'s") for token in tokens]
    exceptions = wordnet.exceptions[part_of_speech]
    bases = [base_forms(token, part_of_speech, exceptions) for token in tokens]
    for lemma in sorted(synset.lemmas, key=lambda lemma: -count_words(lemma)):
        words = lemma.lower().split()
        for start in range(len(bases) - len(words) + 1):
            if all(word in bases[start + place] for place, word in enumerate(words)):
                return lemma
    return None


def _other_definitions(
    wordnet: WordNet, lemma: str, part_of_speech: str, offset: int
) -> tuple[str, ...]:
    """What the lemma means in its other senses, those of the same part of speech first."""
    own = wordnet.synsets[part_of_speech, offset].definition
    definitions: dict[str, None] = {}
    for letter in (part_of_speech, *(each for each in _FILES if each != part_of_speech)):
        for other in wordnet.senses.get((lemma.lower(), letter), []):
            synset = wordnet.synsets.get((letter, other))
            if synset and synset.definition != own and _is_usable(synset.definition):
                definitions[synset.definition] = None
    return tuple(definitions)


def _is_usable(definition: str) -> bool:
    return count_words(definition) in DEFINITION_WORDS and is_welcome(definition)


def _parse_index(line: str) -> tuple[str, list[int]]:
    """The lemma of a line of an index file and the offsets of its synsets."""
    fields = line.split()
    number_of_synsets = int(fields[2])
    return fields[0].replace("_", " "), [int(each) for each in fields[-number_of_synsets:]]


def _parse_exception(line: str) -> tuple[str, list[str]]:
    """An irregular form and its base forms."""
    form, *bases = line.split()
    return form, bases


def _parse_tag_count(line: str) -> tuple[str, int]:
    """The lemma and the count of a line ``lemma%the:rest:of:the:key  sense_number  count``."""
    sense_key, _, count = line.split()
    return sense_key.rpartition("%")[0].replace("_", " "), int(count)


def _parsed(path: Path, parse: Callable[[str], Parsed]) -> Iterator[Parsed]:
    """What the file's lines say; the licence, whose lines start with two spaces, is left out."""
    if not path.is_file():
        raise FileNotFoundError(f"the WordNet folder lacks {path.name}: {path.parent}")
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line.strip() or line.startswith("  "):
            continue
        try:
            yield parse(line)
        except (ValueError, IndexError) as error:
            raise ValueError(f"cannot read this line of {path} ({error}): {line[:80]!r}") from error
