"""FOLDOC and the Jargon File: terms, and their entries with the term masked."""

from pathlib import Path
import re

from experiments.facts import Fact
from tools.sample.build import JARGON_QUESTIONS
from tools.sample.jargon import (
    MOST_HEADWORD_WORDS,
    mask,
    read_dictd,
    read_jargon,
    running_text,
    shorten,
)
from tools.sample.text import clean, count_words, is_welcome, pick, term_key

ENTRY_WORDS = range(8, 81)
FOLDOC_INDENT = 3
FOLDOC_QUESTIONS = (
    'What is "{term}" in computing?',
    'Explain the computing term "{term}".',
    'What does "{term}" mean to a programmer?',
    'Give a dictionary entry for the computing term "{term}".',
)
# The field of an entry, such as "<language, Prolog>" at its start.
_FIELD = re.compile(r"<[a-z][^<>]{1,60}>\s*", re.IGNORECASE)
_ADDRESS = re.compile(r"\s*\((https?|ftp):[^()\s]*\)")
# Paragraphs with only a date, a reference or an address.
_POINTER = re.compile(
    r"\s*(\((19|20)\d\d-\d\d-\d\d\)|\[|\{[^{}]*\((https?|ftp):|\{\(|E-mail)", re.I
)


def read_jargon_entries(path: Path) -> list[Fact]:
    """Returns a fact for each entry of the Jargon File in `jargon.dict.dz`."""
    return [
        _fact((entry.headword,), entry.text, entry.masked_text, JARGON_QUESTIONS)
        for entry in read_jargon(path, ENTRY_WORDS)
    ]


def read_foldoc_entries(path: Path) -> list[Fact]:
    """Returns a fact for each entry of FOLDOC in `foldoc.dict.dz`."""
    facts = [_foldoc_fact(raw) for raw in read_dictd(path)]
    return [fact for fact in facts if fact is not None]


def _foldoc_fact(raw: str) -> Fact | None:
    """Returns None if the entry is too short or its term is a symbol."""
    heading, _, body = raw.strip("\n").partition("\n\n")
    terms = tuple(clean(line) for line in heading.split("\n") if line.strip())
    text = shorten(_foldoc_text(body), ENTRY_WORDS)
    masked_text = text
    for term in sorted(terms, key=len, reverse=True):
        masked_text = mask(masked_text, term)
    is_term = re.search("[A-Za-z]{2}", terms[0]) and count_words(terms[0]) <= MOST_HEADWORD_WORDS
    told = masked_text.replace("____", "")
    if not is_term or count_words(told) < ENTRY_WORDS.start or not is_welcome(*terms, text):
        return None
    return _fact(terms, text, masked_text, FOLDOC_QUESTIONS)


def _foldoc_text(body: str) -> str:
    paragraphs = re.split(r"\n\s*\n", body)
    kept = [paragraph for paragraph in paragraphs if not _POINTER.match(paragraph)]
    text = running_text("\n\n".join(kept), FOLDOC_INDENT)
    return _FIELD.sub("", _ADDRESS.sub("", text))


def _fact(terms: tuple[str, ...], text: str, masked: str, questions: tuple[str, ...]) -> Fact:
    term = terms[0]
    keys = dict.fromkeys(f"term {term_key(each)}" for each in terms)
    return Fact(
        keys=tuple(keys),
        user=pick(questions, term).format(term=term, word=term),
        assistant=text,
        query=term,
        passage=masked,
    )
