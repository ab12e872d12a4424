"""The FAQs of Perl (pod) and Python (reStructuredText): questions and answers."""

from collections.abc import Iterator
import itertools
from pathlib import Path
import re

from experiments.facts import Fact
from tools.sample.jargon import shorten
from tools.sample.text import clean, count_words, term_key

ANSWER_WORDS = range(8, 101)
_POD_CODE = re.compile(r"[A-Z]<<? ?([^<>]*?) ?>?>")
_POD_ESCAPES = {"E<lt>": "<", "E<gt>": ">", "E<sol>": "/", "E<verbar>": "|"}
_CREDIT = re.compile(r"\(contributed by ", re.IGNORECASE)


def read_faqs(perl: Path, python: Path) -> list[Fact]:
    """Returns a fact for each question.

    Args:
      perl: folder with `perlfaq1.pod` etc.
      python: folder with `general.rst.txt` etc.
    """
    facts = []
    for language, folder, pattern, read in (
        ("Perl", perl, "perl*faq*.pod", _pod_sections),
        ("Python", python, "*.rst.txt", _rst_sections),
    ):
        files = sorted(folder.glob(pattern))
        if not files:
            raise FileNotFoundError(f"no FAQ of {language} ({pattern}) in {folder}")
        for path in files:
            sections = read(path.read_text(encoding="utf-8"))
            facts += [_fact(language, question, body) for question, body in sections]
    return [fact for fact in facts if fact is not None]


def _fact(language: str, question: str, body: str) -> Fact | None:
    """Returns None if the heading is not a question or the answer is too short."""
    question, answer = clean(question), shorten(clean(body), ANSWER_WORDS)
    if "?" not in question or count_words(answer) < ANSWER_WORDS.start:
        return None
    names_language = language.lower() in question.lower()
    return Fact(
        keys=(f"question {term_key(question)}",),
        user=question if names_language else f"{language}: {question}",
        assistant=answer,
        query=question,
        passage=answer,
    )


def _pod_sections(text: str) -> Iterator[tuple[str, str]]:
    """Yields each heading and its paragraphs, without code and list markers."""
    for section in re.split(r"^=head2 ", text, flags=re.M)[1:]:
        heading, *paragraphs = re.split(r"\n\s*\n", re.split(r"^=head1 ", section, flags=re.M)[0])
        kept = [p for p in paragraphs if not p.startswith(("=", " ", "\t"))]
        kept = [p for p in kept if not _CREDIT.match(p)]
        yield _plain_pod(heading), _plain_pod("\n".join(kept))


def _plain_pod(text: str) -> str:
    """Removes formatting codes; L<text|name> becomes its text."""
    for escape, character in _POD_ESCAPES.items():
        text = text.replace(escape, {"<": "\ue000", ">": "\ue001"}.get(character, character))
    text = re.sub(r"\s*X<[^<>]*>", "", text)  # Index entries.
    text = re.sub(r"L<([^<>|]*)\|[^<>]*>", r"\1", text)
    while (plain := _POD_CODE.sub(r"\1", text)) != text:
        text = plain
    return text.replace("\ue000", "<").replace("\ue001", ">")


def _rst_sections(text: str) -> Iterator[tuple[str, str]]:
    """Yields each underlined title and the text up to the next title."""
    titles = list(re.finditer(r"^(\S.*)\n([-=~^])\2{2,}[ \t]*$", text, re.M))
    for title, following in itertools.zip_longest(titles, titles[1:]):
        end = following.start() if following else len(text)
        paragraphs = re.split(r"\n\s*\n", text[title.end() : end])
        kept = [p.strip("\n") for p in paragraphs]
        kept = [p for p in kept if p and not p.startswith((" ", "\t", "..", "=", ">>>"))]
        yield _plain_rst(title[1]), _plain_rst("\n".join(kept))


def _plain_rst(text: str) -> str:
    """Removes roles, links and emphasis."""
    text = re.sub(r"::(?=\s|$)", ":", text)
    text = re.sub(r":[a-z:]+:`[~!]?([^`<]*?)\s*(?:<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", text)
    return re.sub(r"``?([^`]+)``?_?|\*{1,2}([^*\n]+)\*{1,2}", r"\1\2", text)
