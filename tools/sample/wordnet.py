"""Parses WordNet 3.0 and pairs words in example sentences with their senses."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
import re

from tools.sample.text import clean, count_words, is_welcome

# Short texts, so that many fit in the sample.
SENTENCE_WORDS = range(4, 17)
DEFINITION_WORDS = range(3, 25)

# The letter of each part of speech in the database, and its file name.
_FILES = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
# WordNet's rules of detachment: an inflected ending and the base form's ending.
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
    """A synset: its words, definition ("" if unusable) and example sentences."""

    lemmas: tuple[str, ...]
    definition: str
    sentences: tuple[str, ...]


@dataclass
class WordNet:
    """The parts of the database used by the sample."""

    # Keyed by part of speech and offset in its data file.
    synsets: dict[tuple[str, int], Synset] = field(default_factory=dict)
    # Synset offsets, most common sense first, by lower-case lemma and part of speech.
    senses: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    # Base forms of irregular forms, by part of speech.
    exceptions: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    # Number of tags in the semantic concordances, over all senses, by lower-case lemma.
    tag_counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SensePair:
    """A word in a sentence, its definition there and those of its other senses."""

    word: str
    sentence: str
    definition: str
    other_definitions: tuple[str, ...]
    tag_count: int


def read_wordnet(folder: Path) -> WordNet:
    """Reads the database from the folder with ``data.noun``, ``index.noun`` etc."""
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
    """Parses a line of a data file into offset and synset."""
    record, separator, gloss = line.partition(" | ")
    if not separator:
        raise ValueError("there is no gloss")
    fields = record.split(" ")
    words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
    # Adjectives may have a position marker, such as "asleep(p)".
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
    # With an odd number of quotation marks, it is unclear what is quoted.
    sentences = pieces[1::2] if len(pieces) % 2 else []
    return definition, [clean(sentence) for sentence in sentences]


def find_pairs(wordnet: WordNet, most_negatives: int) -> list[SensePair]:
    """Returns all usable pairs of words with at least one other sense, in a stable order."""
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
    """Returns the possible base forms of `form`, including itself."""
    bases = {form, *exceptions.get(form, [])}
    for ending, replacement in _ENDINGS[part_of_speech]:
        if form.endswith(ending) and len(form) > len(ending) + 1:
            bases.add(form.removesuffix(ending) + replacement)
    return bases


def _lemma_in(sentence: str, synset: Synset, part_of_speech: str, wordnet: WordNet) -> str | None:
    """Returns the longest lemma in the sentence, so that phrases win over their parts."""
    tokens = re.findall(r"[^\W_]+(?:['.-][^\W_]+)*", sentence.lower())
    tokens = [token.removesuffix("'s") for token in tokens]
    exceptions = wordnet.exceptions[part_of_speech]
    bases = [base_forms(token, part_of_speech, exceptions) for token in tokens]
    for lemma in sorted(synset.lemmas, key=lambda lemma: -count_words(lemma)):
        words = lemma.lower().split()
        for start in range(len(bases) - len(words) + 1):
            if all(word in bases[start + offset] for offset, word in enumerate(words)):
                return lemma
    return None


def _other_definitions(
    wordnet: WordNet, lemma: str, part_of_speech: str, offset: int
) -> tuple[str, ...]:
    """Returns definitions of the lemma's other senses, same part of speech first."""
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
    """Parses a line of an index file into lemma and synset offsets."""
    fields = line.split()
    number_of_synsets = int(fields[2])
    return fields[0].replace("_", " "), [int(each) for each in fields[-number_of_synsets:]]


def _parse_exception(line: str) -> tuple[str, list[str]]:
    """Parses an irregular form and its base forms."""
    form, *bases = line.split()
    return form, bases


def _parse_tag_count(line: str) -> tuple[str, int]:
    """Parses lemma and count from ``lemma%rest:of:the:key  sense_number  count``."""
    sense_key, _, count = line.split()
    return sense_key.rpartition("%")[0].replace("_", " "), int(count)


def _parsed[Parsed](path: Path, parse: Callable[[str], Parsed]) -> Iterator[Parsed]:
    """Yields the parsed lines of a file, without the license, whose lines start with two spaces."""
    if not path.is_file():
        raise FileNotFoundError(f"the WordNet folder {path.parent} has no {path.name}")
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line.strip() or line.startswith("  "):
            continue
        try:
            yield parse(line)
        except (ValueError, IndexError) as error:
            raise ValueError(f"cannot parse a line of {path} ({error}): {line[:80]!r}") from error
