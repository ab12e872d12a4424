"""JSONL files in blocks: no line is lost, repeated or misnumbered."""

import gzip
import io
import json

from hypothesis import example, given, settings, strategies
import pytest

from grit_jax.text import jsonl
from grit_jax.text.examples import RejectedExample
from grit_jax.text.jsonl import (
    JsonlFiles,
    SourceError,
    find_files,
    is_held_out,
    kind_of_files,
    parse_line,
    read_blocks,
    split_blocks,
)

LIMIT = 12
some_lines = strategies.lists(strategies.text("ab \r\t", max_size=2 * LIMIT).map(str.encode))


def numbered(blocks):
    return [numbered_line for block in blocks for numbered_line in block.lines()]


@settings(deadline=None)
@given(some_lines, strategies.integers(1, 40), strategies.booleans())
@example([b"a" * 20, b"", b"b"], 4, True)
def test_every_line_has_its_number_and_its_content(lines, block_bytes, ends_with_break):
    content = b"\n".join(lines) + (b"\n" if ends_with_break else b"")
    expected = [
        (number, b"" if len(line) > LIMIT else line)
        for number, line in enumerate(content.split(b"\n"), 1)
        if line.strip() or len(line) > LIMIT
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "MAX_LINE_BYTES", LIMIT)
        assert numbered(split_blocks(io.BytesIO(content), block_bytes)) == expected


def test_a_line_that_is_too_long_is_never_held(monkeypatch):
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    content = b"first\n" + b"x" * 1_000_000 + b"\nlast\n"
    blocks = list(split_blocks(io.BytesIO(content), 100))
    assert max(len(block.data) for block in blocks) <= 1100
    assert numbered(blocks) == [(1, b"first"), (2, b""), (3, b"last")]
    with pytest.raises(RejectedExample, match="line over"):
        parse_line(b"")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"query": ', "broken JSON"),
        (b"{'query': 1}", "broken JSON"),
        (b"[" * 200_000, "broken JSON"),
        (b'{"n": ' + b"1" * 10_000 + b"}", "broken JSON"),
        (b'{"query": "\xff"}', "invalid UTF-8"),
        ('{"query": "x"}'.encode("utf-16"), "NUL"),
        (b'{"query": "a\0b"}', "NUL"),
        (b'{"query": "a"},', "a comma after the object"),
        (b'{"query": "a"}\r{"query": "b"}\r', r"lines end with \\r instead of \\n"),
        (b"[1, 2]", "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
)
def test_a_line_that_is_no_object_is_rejected_with_the_reason(line, reason):
    with pytest.raises(RejectedExample, match=reason):
        parse_line(line)


def test_files_from_windows_are_read():
    assert parse_line(b'\xef\xbb\xbf{"a": "\xc3\xbc"}\r') == {"a": "ü"}


def test_compressed_files_are_read_alike(tmp_path):
    content = b"".join(b'{"a": %d}\n' % number for number in range(1000))
    (tmp_path / "plain.jsonl").write_bytes(content)
    # Two members, as `cat a.gz b.gz` makes.
    packed = gzip.compress(content[:5000], mtime=0) + gzip.compress(content[5000:])
    (tmp_path / "packed.jsonl.gz").write_bytes(packed)
    plain, packed = (
        numbered(read_blocks(tmp_path / name, 999)) for name in ("plain.jsonl", "packed.jsonl.gz")
    )
    assert plain == packed
    assert [json.loads(line)["a"] for _, line in plain] == list(range(1000))


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b[:400] + b"x" * 50 + b[450:]])
def test_a_damaged_compressed_file_is_named(tmp_path, damage):
    path = tmp_path / "broken.jsonl.gz"
    content = "".join(json.dumps({"a": number**9}) + "\n" for number in range(1000))
    path.write_bytes(damage(gzip.compress(content.encode())))
    with pytest.raises(SourceError, match=r"broken\.jsonl\.gz, after line \d+: "):
        list(read_blocks(path, 100))


def test_the_held_out_fraction_is_about_what_was_asked_and_falls_as_the_seed_says():
    lines = [b"line %d" % number for number in range(20_000)]
    chosen = {line for line in lines if is_held_out(line, 0.1, seed=3)}
    assert 1_800 < len(chosen) < 2_200
    assert chosen < {line for line in lines if is_held_out(line, 0.2, seed=3)}
    others = {line for line in lines if is_held_out(line, 0.1, seed=4)}
    assert 100 < len(chosen & others) < 300
    assert is_held_out(lines[0] + b"\r", 0.5, 0) == is_held_out(lines[0], 0.5, 0)


def test_lines_are_held_out_of_training_alone():
    files = JsonlFiles({"train": (), "validation": ()}, held_out=0.5)
    lines = [str(number).encode() for number in range(100)]
    assert {files.split_of("train", line) for line in lines} == {"train", "held_out"}
    assert {files.split_of("validation", line) for line in lines} == {"validation"}


def test_files_are_found_in_subfolders_and_in_order(tmp_path):
    for name in ("b.jsonl", "sub/a.jsonl.gz", "a.jsonl", "notes.md", ".git/x.jsonl", "x.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = [str(path.relative_to(tmp_path)) for path in find_files(tmp_path)]
    assert found == ["a.jsonl", "b.jsonl", "sub/a.jsonl.gz"]
    assert find_files(tmp_path / "x.json") == [tmp_path / "x.json"]
    with pytest.raises(SourceError, match=r"nowhere: no such file or folder"):
        find_files(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"empty has no \.jsonl or \.jsonl\.gz file: write one"):
        find_files(tmp_path / "empty")
    (tmp_path / "empty" / "x.csv").touch()
    with pytest.raises(SourceError, match=r"empty has no \.jsonl .* file, only x\.csv: write one"):
        find_files(tmp_path / "empty")


LINE = b'{"query": "q", "pos": ["p"]}'


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        (
            "x.jsonl",
            b"[" + LINE + b",\n" + LINE + b"]\n",
            r"JSON array: .*jq -c '.\[\]' x",
        ),
        ("x.json", b"\xef\xbb\xbf \n[\n " + LINE + b"\n]", "is a JSON array"),
        ("x.jsonl.gz", gzip.compress(b"[" + LINE + b"]", mtime=0), "is a JSON array"),
        (
            "x.json",
            json.dumps({"query": "q"}, indent=2).encode(),
            "several lines: .*jq -c .",
        ),
        ("x.parquet", b"PAR1", r"table, .*pandas.read_parquet\('x.parquet'\)"),
        ("x.jsonl", b"PAR1", "pandas.read_parquet"),
        ("x.csv", b"query,pos\na,b\n", "pandas.read_csv"),
        ("x.jsonl", gzip.compress(LINE, mtime=0), "is compressed: .*jsonl.gz"),
        ("x.jsonl", LINE.decode().encode("utf-16"), "not UTF-8: .*iconv -f UTF-16"),
        ("x.jsonl", LINE.decode().encode("utf-16-le"), "not UTF-8: .*iconv -f UTF-16"),
    ],
)
def test_a_file_of_another_format_is_named_with_what_to_do(tmp_path, name, content, remedy):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceError, match=remedy) as error:
        kind_of_files([path], None)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_kind_of_a_file_is_that_of_its_first_example(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('broken\n{"title": 1}\n\n{"text": ["u", "a"]}\n{"query": "q"}\n')
    assert kind_of_files([path], None) == "generative"
    path.write_text('{"title": 1}\n')
    with pytest.raises(
        SourceError,
        match=r"a\.jsonl: no line is an example \(line 1: it has 'title'\); .*\"messages\"",
    ):
        kind_of_files([path], None)
    path.write_text('{"title": 1}\n')
    assert kind_of_files([path], lambda raw: {"query": raw["title"]}) == "embedding"
