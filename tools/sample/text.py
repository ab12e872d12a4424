"""Cleaning, keys and the split: what the WordNet and the Jargon File samples have in common."""

from collections.abc import Iterable
import hashlib
import re
import unicodedata

# One key in this many goes to the held-out side.
HELD_OUT_ONE_IN = 7

# Slurs and the like make poor sample text; dictionaries mark them with these words.
_UNWELCOME = re.compile(
    r"\b(slurs?|offensive|disparag\w*|derogatory|obscen\w*|vulgar\w*|taboo|racist|sexual\w*"
    r"|fuck\w*|shit\w*|rap(?:e|ed|es|ing|ist)|whor\w*|prostitut\w*)\b",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """One line of text: no control or invisible characters, single spaces, stripped."""
    spaced = "".join(" " if character.isspace() else character for character in text)
    visible = (c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs"))
    return re.sub(" +", " ", "".join(visible)).strip()


def is_welcome(*texts: str) -> bool:
    """Whether none of the texts holds a slur or is marked as one."""
    return not any(_UNWELCOME.search(text) for text in texts)


def count_words(text: str) -> int:
    """The number of words between spaces."""
    return len(text.split())


def term_key(term: str) -> str:
    """The key a term is split by: "Dead-Codes", "dead code" and "dead coding" share one.

    The stemming is deliberately greedy: two terms that wrongly share a key merely end on the
    same side of the split, whereas two forms of one term must never stand on both sides.
    """
    plain = unicodedata.normalize("NFKD", term.casefold())
    words = re.findall(r"[a-z0-9]+", "".join(c for c in plain if not unicodedata.combining(c)))
    return " ".join(_stem(word) for word in words) or term.casefold().strip()


def stable_number(text: str) -> int:
    """A number that depends on the text alone, unlike ``hash``, which differs per process."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def is_held_out(term: str) -> bool:
    """Whether the term belongs to the held-out side."""
    return stable_number("split " + term_key(term)) % HELD_OUT_ONE_IN == 0


def pick(choices: tuple[str, ...], text: str) -> str:
    """One of the choices, always the same one for the same text."""
    return choices[stable_number("pick " + text) % len(choices)]


def in_stable_order(texts: Iterable[str]) -> list[str]:
    """The texts in an order that looks random but is always the same."""
    return sorted(texts, key=lambda text: (stable_number("order " + text), text))


def _stem(word: str) -> str:
    """The word without its plural, past or participle ending, roughly."""
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    for ending in ("ing", "ed", "es", "s"):
        stem = word.removesuffix(ending)
        if stem != word and len(stem) >= 3 and not word.endswith("ss"):
            return _bare(stem)
    return _bare(word)


def _bare(stem: str) -> str:
    """The stem without a doubled last consonant or a silent e ("stopp", "code")."""
    if len(stem) > 3 and stem[-1] == stem[-2]:
        return stem[:-1]
    return stem[:-1] if len(stem) > 3 and stem.endswith("e") else stem
