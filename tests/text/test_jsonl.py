"""JSONL files in blocks: no line is lost, repeated or misnumbered."""

import gzip
import io
import json

from hypothesis import example, given, settings, strategies
import pytest
import zstandard

from grit_jax.text import json_stream, jsonl
from grit_jax.text.examples import RejectedExample
from grit_jax.text.jsonl import (
    SourceError,
    is_held_out,
    parse_line,
    read_blocks,
    split_array,
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
    frames = [zstandard.compress(part) for part in (content[:5000], b"", content[5000:])]
    (tmp_path / "packed.jsonl.zst").write_bytes(b"".join(frames))
    plain, *packed = (
        numbered(read_blocks(tmp_path / name, 999))
        for name in ("plain.jsonl", "packed.jsonl.gz", "packed.jsonl.zst")
    )
    assert packed == [plain, plain]
    assert [json.loads(line)["a"] for _, line in plain] == list(range(1000))


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b[:400] + b"x" * 50 + b[450:]])
@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_damaged_compressed_file_is_named(tmp_path, damage, suffix):
    path = tmp_path / f"broken.jsonl.{suffix}"
    content = "".join(json.dumps({"a": number**9}) + "\n" for number in range(1000))
    compress = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor(write_checksum=True).compress}[
        suffix
    ]
    path.write_bytes(damage(compress(content.encode())))
    with pytest.raises(SourceError, match=rf"broken\.jsonl\.{suffix}, after line \d+: "):
        list(read_blocks(path, 100))


def test_the_held_out_fraction_is_about_what_was_asked_and_falls_as_the_seed_says():
    lines = [b"line %d" % number for number in range(20_000)]
    chosen = {line for line in lines if is_held_out(line, 0.1, seed=3)}
    assert 1_800 < len(chosen) < 2_200
    assert chosen < {line for line in lines if is_held_out(line, 0.2, seed=3)}
    others = {line for line in lines if is_held_out(line, 0.1, seed=4)}
    assert 100 < len(chosen & others) < 300
    assert is_held_out(lines[0] + b"\r", 0.5, 0) == is_held_out(lines[0], 0.5, 0)


LINE = b'{"query": "q", "pos": ["p"]}'


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("x.json", json.dumps({"query": "q"}, indent=2).encode(), "several lines: .*jq -c ."),
        ("x.jsonl", gzip.compress(LINE, mtime=0), "is compressed: .*jsonl.gz"),
        ("x.jsonl", LINE.decode().encode("utf-16"), "not UTF-8: .*iconv -f UTF-16"),
        ("x.jsonl", LINE.decode().encode("utf-16-le"), "not UTF-8: .*iconv -f UTF-16"),
        ("x.json", b"[" + LINE + b",\n" + LINE[:-5], "x.json, after element 0: .*too early"),
        ("x.json", b"[" + LINE + b" " + LINE + b"]", r"',' or '\]' expected, not '{'"),
        ("x.json", b"[" + LINE + b"] x", "'x' after the end of the array"),
    ],
)
def test_a_file_of_another_format_is_named_with_what_to_do(tmp_path, name, content, remedy):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceError, match=remedy) as error:
        list(read_blocks(path, 1000))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


values = strategies.recursive(
    strategies.none() | strategies.floats(allow_nan=False) | strategies.text(),
    lambda inner: strategies.lists(inner) | strategies.dictionaries(strategies.text(), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    strategies.lists(strategies.dictionaries(strategies.text(), values, max_size=3), min_size=1),
    strategies.sampled_from([None, 0, 3]),
    strategies.integers(1, 99),
)
def test_the_elements_of_a_json_array_are_its_lines(elements, indent, block_bytes):
    content = json.dumps(elements, indent=indent, ensure_ascii=False)
    stream = io.BytesIO(content.encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "MIN_CHUNK_BYTES", 1)
        lines = numbered(split_array(stream, block_bytes))
    assert [number for number, _ in lines] == list(range(1, len(elements) + 1))
    read = [json.loads(line.decode("utf-8", "surrogatepass")) for _, line in lines]
    assert read == elements
