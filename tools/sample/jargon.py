"""Parses the Jargon File in dictd format and masks each entry's headword."""

from dataclasses import dataclass
import gzip
from pathlib import Path
import re
import zlib

from tools.sample.text import clean, count_words, is_welcome

MASK = "____"
ENTRY_WORDS = range(8, 46)
MOST_HEADWORD_WORDS = 6

_DICTD_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_ABBREVIATIONS = ("e.g.", "i.e.", "esp.", "var.", "syn.", "orig.", "cf.", "vs.", "abbrev.",
                  "dr.", "mr.", "mrs.", "st.", "ca.", "prob.", "pron.", "pl.", "n.", "v.",
                  "vt.", "vi.", "adj.", "adv.", "interj.", "u.s.", "no.")  # fmt: skip
_CROSS_REFERENCE = re.compile(r"\W*(see|compare|cf|syn|var|variant|alternate|same as)\b", re.I)
_DRAWING = re.compile("[\u2500-\u257f]")


@dataclass(frozen=True)
class Entry:
    """A headword, the start of its entry, and the same text with the headword masked."""

    headword: str
    text: str
    masked_text: str


def read_jargon(path: Path, num_words: range = ENTRY_WORDS) -> list[Entry]:
    """Returns the usable entries of ``jargon.dict.dz``, which needs ``jargon.index`` next to it."""
    entries = [parse_entry(raw, num_words) for raw in read_dictd(path)]
    return [entry for entry in entries if entry]


def read_dictd(path: Path) -> list[str]:
    """Returns the raw entries of a dictd dictionary, in the order of its index."""
    index = path.with_name(path.name.removesuffix(".dz").removesuffix(".dict") + ".index")
    for needed in (path, index):
        if not needed.is_file():
            raise FileNotFoundError(f"this dictionary file does not exist: {needed}")
    data = _read_bytes(path)
    # The index lists an entry under each of its headwords.
    spans = {}
    for line in index.read_text(encoding="utf-8").splitlines():
        headword, offset, size = _parse_index(line, index)
        if not headword.startswith("00-database"):
            spans[offset, size] = None
    return [data[offset : offset + size].decode("utf-8") for offset, size in spans]


def parse_entry(raw: str, num_words: range = ENTRY_WORDS) -> Entry | None:
    """Returns the entry, or None if it is too short, a cross-reference or offensive."""
    headword_line, _, body = raw.strip("\n").partition("\n")
    headword, text = clean(headword_line), shorten(running_text(body), num_words)
    masked_text = mask(text, headword)
    told = " ".join(each for each in split_sentences(text) if not _CROSS_REFERENCE.match(each))
    is_long_enough = min(count_words(told), count_words(masked_text)) >= num_words.start
    is_term = re.search("[A-Za-z]{2}", headword) and count_words(headword) <= MOST_HEADWORD_WORDS
    if not (is_long_enough and is_term and is_welcome(headword, text)):
        return None
    return Entry(headword, text, masked_text)


def shorten(text: str, num_words: range = ENTRY_WORDS) -> str:
    """Returns the first sentences that fit, or the first words and " ..."."""
    most = num_words.stop - 1
    kept: list[str] = []
    for sentence in split_sentences(text):
        if count_words(" ".join([*kept, sentence])) > most:
            break
        kept.append(sentence)
    shortened = " ".join(kept)
    if shortened == text or count_words(shortened) >= num_words.start:
        return shortened
    return " ".join(text.split()[:most]) + " ..."


def split_sentences(text: str) -> list[str]:
    """Splits text into sentences; joining them with spaces restores the text."""
    sentences: list[list[str]] = [[]]
    words = text.split()
    for word, following in zip(words, [*words[1:], ""], strict=False):
        sentences[-1].append(word)
        if following and _ends_sentence(word, following):
            sentences.append([])
    return [" ".join(sentence) for sentence in sentences if sentence]


def mask(text: str, headword: str) -> str:
    """Replaces the headword, and words that contain it, by the mask."""
    for form in headword_forms(headword):
        text = headword_pattern(form).sub(MASK, text)
    return text


def headword_forms(headword: str) -> list[str]:
    """Returns spellings of the headword, longest first; "Death, X of" is "X of Death" in text."""
    forms = {headword, headword.strip("-*/!? ")}
    if ", " in headword:
        first, _, last = headword.partition(", ")
        forms.update((f"{last} {first}", first))
    if "/" in headword.strip("/"):
        forms.update(part for part in headword.split("/") if len(part) > 2)
    return sorted((form for form in forms if form), key=lambda form: (-len(form), form))


def headword_pattern(form: str) -> re.Pattern[str]:
    """Returns a pattern for the form: any case, inflected, spaced, hyphenated or closed up."""
    parts = [re.escape(part) for part in re.split(r"[\s-]+", form) if part]
    spelled = r"[\s-]*".join(parts)
    # A longer term inside a word is rarely chance ("hack" in "hackish"); a short one usually is
    # ("arc" in "search").
    if len(form) >= 4 and form[0].isalnum() and form[-1].isalnum():
        return re.compile(rf"\w*{spelled}\w*(?:['’]s)?", re.IGNORECASE)
    endings = r"(?:['’]?s|es|['’]?ed|['’]?ing|er|ers)?"
    return re.compile(rf"(?<!\w){spelled}{endings}(?!\w)", re.IGNORECASE)


def _read_bytes(path: Path) -> bytes:
    """Reads a file; ``.dz`` files are gzip files with a table for random access."""
    if path.suffix != ".dz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"cannot unpack {path}: {error}") from error


def running_text(body: str, indent: int = 4) -> str:
    """Returns the paragraphs as one line, without other indentation (verse, code, ...)."""
    paragraphs = re.split(r"\n\s*\n", "\n" + body)
    kept = []
    for paragraph in paragraphs:
        lines = [line for line in paragraph.split("\n") if line.strip()]
        is_plain = all(re.match(rf" {{{indent}}}\S", line) for line in lines)
        if lines and is_plain and not _DRAWING.search(paragraph):
            kept.append(" ".join(lines))
    # Cross-references are in braces, sometimes with a line break inside.
    without_braces = re.sub(r"\{\s*([^{}]*?)\s*\}", r"\1", clean(" ".join(kept)))
    return re.sub(r" +([.,;:)])", r"\1", without_braces)


def _ends_sentence(word: str, following: str) -> bool:
    """Returns whether a sentence ends after the word; "1." and "e.g." do not end one."""
    bare = word.rstrip("\"”’)]'")
    is_number = re.fullmatch(r"\(?\d+\.", bare) is not None
    if not bare.endswith((".", "!", "?")) or is_number:
        return False
    if bare.lstrip('"“‘([').lower() in _ABBREVIATIONS or re.fullmatch(r"[A-Z]\.", bare):
        return False
    return not following.lstrip('"“‘([')[:1].islower()


def _parse_index(line: str, index: Path) -> tuple[str, int, int]:
    """Parses a line of the index: headword, offset and size of the entry."""
    fields = line.split("\t")
    if len(fields) != 3:
        raise ValueError(f"not a line of a dictd index in {index}: {line[:80]!r}")
    return fields[0], _parse_number(fields[1], index), _parse_number(fields[2], index)


def _parse_number(digits: str, index: Path) -> int:
    number = 0
    for digit in digits:
        if digit not in _DICTD_DIGITS:
            raise ValueError(f"not a dictd number in {index}: {digits!r}")
        number = 64 * number + _DICTD_DIGITS.index(digit)
    return number
