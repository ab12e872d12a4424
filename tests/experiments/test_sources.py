"""Parsing of each source, on small texts."""

import gzip
import sys

import pytest

from experiments import split
from experiments.sources import descriptions, dictionaries, faq, reasoning, wordnet

STATION = """\
Station Management
SMT

   <networking> (SMT) One of the 4 key {FDDI} component layers.  Station
   management handles the
   {ring (http://example.org/)}.

    int code();

   ["A Book", 1993].

   (1997-05-11)

"""
CROSS_REFERENCE = "state machine\n\n   {finite state machine}\n\n"
SYMBOL = "!\n\n   <character> The character with code 33, which some people call a bang.\n\n"

PACKAGES = """\
Package: libfoo-dev
Source: foo (1.2-3)
Version: 1

Package: foo
Version: 1

Package: alone
Version: 1
"""
TRANSLATION = """\
Package: libfoo-dev
Description-md5: 0
Description-en: development files of a thing
 This is what is needed to develop with foo, and nothing else at all.

Package: foo
Description-md5: 0
Description-en: thing that does 3 things
 Foo does three things, and does them well, as FOO's users
 say.
 .
  * a list of features
 .
 It was made by hand.
Another: field

Package: alone
Description-md5: 0
Description-en: too short
 Nothing here.
"""

POD = """\
=head1 NAME

perlfaq4 - Data Manipulation

=head2 Why is int() broken?
X<int>

(contributed by somebody)

Your C<int()> is most probably working, see L<the manual|perlfunc/int> or L<perlop>, if 1 E<lt> 2.

    print int(0.6/0.2-2);

It is B<not> broken.

=head2 See also

This is no question, and has quite a long text all the same.

=head1 AUTHOR
"""
RST = """\
==========
Design FAQ
==========

Why are floats so *inaccurate*?
-------------------------------

Users of :class:`float` and of ``1.2 - 1.0`` are surprised, see `the site <https://example.org>`_::

    >>> 1.2 - 1.0

.. note:: This is a note.

It is not Python's fault.


Short?
------

See above.
"""


def write_dictionary(folder, *entries):
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    data, index = b"", ""
    for entry in entries:
        place, size = (digits[n // 64] + digits[n % 64] for n in (len(data), len(entry.encode())))
        for headword in entry.split("\n\n")[0].split("\n"):
            index += f"{headword.lower()}\t{place}\t{size}\n"
        data += entry.encode()
    (folder / "foldoc.index").write_text(index)
    (folder / "foldoc.dict.dz").write_bytes(gzip.compress(data))
    return folder / "foldoc.dict.dz"


def test_foldoc_entries_mask_all_their_terms(tmp_path):
    path = write_dictionary(tmp_path, STATION, CROSS_REFERENCE, SYMBOL)
    (fact,) = dictionaries.read_foldoc_entries(path)
    assert fact.query == "Station Management"
    assert fact.passage == "(____) One of the 4 key FDDI component layers. ____ handles the ring."
    assert fact.assistant == (
        "(SMT) One of the 4 key FDDI component layers. Station management handles the ring."
    )
    assert fact.keys == ("term station management", "term smt")
    assert '"Station Management"' in fact.user


def test_a_source_package_has_one_description_with_its_name_masked(tmp_path):
    (tmp_path / "Packages").write_text(PACKAGES)
    (tmp_path / "Translation-en").write_text(TRANSLATION)
    (fact,) = descriptions.read_descriptions(tmp_path / "Translation-en", tmp_path / "Packages")
    assert fact.query == "thing that does 3 things"
    assert fact.passage == (
        "____ does three things, and does them well, as ____ users say. It was made by hand."
    )
    assert fact.keys == ("package foo", "short  thing that does  things ")
    name = fact.passage.replace("____", "Foo", 1).replace("____", "FOO's")
    assert fact.assistant == {"name": name, "summary": fact.query}[fact.kind]


def test_versions_and_equal_descriptions_are_merged(tmp_path):
    packages, translation = "", ""
    for name, version in (("gcc-11", 11), ("gcc-12", 12), ("clone", 13)):
        packages += f"Package: {name}\n\n"
        translation += (
            f"Package: {name}\nDescription-en: compiler of release {version}\n"
            f" This is release {version} of the compiler that all others are compared with.\n\n"
        )
    (tmp_path / "Packages").write_text(packages)
    (tmp_path / "Translation-en").write_text(translation)
    facts = descriptions.read_descriptions(tmp_path / "Translation-en", tmp_path / "Packages")
    assert len(facts) == 1


def test_other_sources_do_not_contain_a_held_out_description(tmp_path):
    name, long = "quuxdraw", "Quuxdraw draws what the users of quuxdraw have in their heads."
    others = [f"quuxdraw-{letter}" for letter in "abcdefgh"]
    packages, translation = "", ""
    for number, package in enumerate([name, *others]):
        packages += f"Package: {package}\n\n"
        more = f" This is part {chr(97 + number)}." if number else ""
        translation += (
            f"Package: {package}\nDescription-en: thing {package[8:]} for heads\n {long}{more}\n\n"
        )
    (tmp_path / "Packages").write_text(packages)
    (tmp_path / "Translation-en").write_text(translation)
    facts = descriptions.read_descriptions(tmp_path / "Translation-en", tmp_path / "Packages")
    (own,) = [fact for fact in facts if fact.keys[0] == f"package {name}"]
    assert len(facts) == 9 and own.kind == "summary"  # No turn contains only the description.
    secret = split.Texts(split.told(own))
    assert all(secret.found_in(fact.user) or secret.found_in(fact.assistant) for fact in facts)


def test_faqs_are_parsed_without_code_credits_and_markup(tmp_path):
    (tmp_path / "perlfaq4.pod").write_text(POD)
    (tmp_path / "design.rst.txt").write_text(RST)
    perl, python = faq.read_faqs(tmp_path, tmp_path)
    assert perl.query == "Why is int() broken?"
    assert perl.user == "Perl: Why is int() broken?"
    assert perl.passage == perl.assistant
    assert perl.passage == (
        "Your int() is most probably working, see the manual or perlop, if 1 < 2. It is not broken."
    )
    assert python.query == "Why are floats so inaccurate?"
    assert python.passage == (
        "Users of float and of 1.2 - 1.0 are surprised, see the site: It is not Python's fault."
    )


def test_a_folder_without_a_faq_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no FAQ of Perl .* in {tmp_path}"):
        faq.read_faqs(tmp_path, tmp_path)


def test_wordnet_asks_for_definitions_and_for_sentences(downloads, senses):
    facts = read_wordnet(downloads)
    assert {(fact.query, fact.passage) for fact in facts} <= {
        (f"{word}: {sentence}", meaning) for word, sentence, meaning, _ in senses
    }
    assert len(facts) > len(senses) / 2
    for fact in facts:
        asked = fact.passage if fact.kind == "sentence" else fact.query.partition(": ")[2]
        answer = fact.query.partition(": ")[2] if fact.kind == "sentence" else fact.passage
        assert asked in fact.user
        assert fact.assistant == answer
    assert {fact.kind for fact in facts} == {"sentence", "definition"}


def read_wordnet(downloads):
    return wordnet.read_senses(downloads / "packages/wordnet-base/usr/share/wordnet")


def test_a_sentence_for_two_senses_is_dropped(downloads, tmp_path):
    folder = tmp_path / "wordnet"
    folder.mkdir()
    for path in (downloads / "packages/wordnet-base/usr/share/wordnet").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    data = (folder / "data.noun").read_text()
    facts = read_wordnet(downloads)
    sentence = facts[0].query.partition(": ")[2]
    other = facts[0].negatives[0]
    (folder / "data.noun").write_text(data.replace(f"| {other}", f'| {other}; "{sentence}"'))
    assert sentence not in {fact.query.partition(": ")[2] for fact in wordnet.read_senses(folder)}


def test_tasks_that_differ_only_in_wording_share_a_key(reasoning_gym):
    facts = reasoning.make_reasoning_items(5)
    assert len(facts) == 5 * len(reasoning.GENERATORS)
    keys = {fact.kind: fact.keys for fact in facts}
    assert keys["chain_sum"] == ("chain_sum 1 4",)
    assert keys["gcd"] == ("gcd 4 6",)
    assert keys["simple_equations"] == ("simple_equations 4*x = 0",)
    assert keys["count_bits"] == ("count_bits  what does count bits make of 4 and 4 ",)


def test_only_sums_with_reordered_terms_share_a_key():
    def key(expression):
        return reasoning._content("chain_sum", {"expression": expression}, "")

    assert key("8 - 5 + 12") == key("12 + 8 - 5") == key("8 + 12 - 5")
    assert len({key("8 - 5 + 12"), key("8 + 5 - 12"), key("8 - 5"), key("5 - 8")}) == 4


def test_items_of_the_real_package_have_one_short_answer(monkeypatch):
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)  # The fake.
    pytest.importorskip("reasoning_gym")
    facts = reasoning.make_reasoning_items(20)
    assert facts == reasoning.make_reasoning_items(20)
    assert {fact.kind for fact in facts} == set(reasoning.GENERATORS)
    for fact in facts:
        assert len(fact.user) < 250
        assert 0 < len(fact.assistant) < 40
        if fact.kind == "chain_sum":
            assert sum(map(int, fact.keys[0].split()[1:])) == int(fact.assistant)
        if fact.kind == "spell_backward":
            assert fact.user.endswith(fact.assistant[::-1])
