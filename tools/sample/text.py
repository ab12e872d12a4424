"""Text cleaning, keys and the split, shared by the WordNet and Jargon File samples."""

from collections.abc import Iterable
import hashlib
import re
import unicodedata

# One key in this many is held out.
HELD_OUT_ONE_IN = 7

# Words by which dictionaries mark slurs and similar entries.
_UNWELCOME = re.compile(
    r"\b(slurs?|offensive|disparag\w*|derogatory|obscen\w*|vulgar\w*|taboo|racist|sexual\w*"
    r"|fuck\w*|shit\w*|rap(?:e|ed|es|ing|ist)|whor\w*|prostitut\w*)\b",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """Returns the text on one line, without control characters and repeated spaces."""
    spaced = "".join(" " if character.isspace() else character for character in text)
    visible = (c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Co", "Cs"))
    return re.sub(" +", " ", "".join(visible)).strip()


def is_welcome(*texts: str) -> bool:
    """Returns whether no text contains a slur or is marked as offensive."""
    return not any(_UNWELCOME.search(text) for text in texts)


def count_words(text: str) -> int:
    """Returns the number of words separated by white space."""
    return len(text.split())


def term_key(term: str) -> str:
    """Returns the key of a term; "Dead-Codes", "dead code" and "dead coding" share one.

    Stemming is greedy on purpose: terms that wrongly share a key only end up in the same split,
    but two forms of one term must never be in different splits.
    """
    plain = unicodedata.normalize("NFKD", term.casefold())
    words = re.findall(r"[a-z0-9]+", "".join(c for c in plain if not unicodedata.combining(c)))
    return " ".join(_stem(word) for word in words) or term.casefold().strip()


def stable_number(text: str) -> int:
    """Returns a 64-bit hash of the text; unlike ``hash``, it is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def is_held_out(term: str) -> bool:
    """Returns whether the term is held out."""
    return stable_number("split " + term_key(term)) % HELD_OUT_ONE_IN == 0


def pick(choices: tuple[str, ...], text: str) -> str:
    """Returns one of the choices, chosen by the hash of the text."""
    return choices[stable_number("pick " + text) % len(choices)]


def in_stable_order(texts: Iterable[str]) -> list[str]:
    """Returns the texts in a fixed pseudorandom order."""
    return sorted(texts, key=lambda text: (stable_number("order " + text), text))


def _stem(word: str) -> str:
    """Removes plural, past and participle endings, approximately."""
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    for ending in ("ing", "ed", "es", "s"):
        stem = word.removesuffix(ending)
        if stem != word and len(stem) >= 3 and not word.endswith("ss"):
            return _bare(stem)
    return _bare(word)


def _bare(stem: str) -> str:
    """Removes a doubled last consonant or a silent e ("stopp", "code")."""
    if len(stem) > 3 and stem[-1] == stem[-2]:
        return stem[:-1]
    return stem[:-1] if len(stem) > 3 and stem.endswith("e") else stem
