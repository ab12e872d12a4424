"""Storage: what fails for a moment is tried again, and what is broken is named."""

import os
import resource

import numpy as np
from prepared_data import chat_examples, write_prepared
import pytest

from grit_jax.data import storage
from grit_jax.data.manifest import PreparedDataset, load_mixture
from grit_jax.data.storage import PreparedDataError, RecordReader, read_file, with_retries


@pytest.fixture
def waited(monkeypatch):
    """The seconds that were waited, none of which pass."""
    waits = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    return waits


def failing(error, times, result="content"):
    errors = iter([error] * times)

    def action():
        for each in errors:
            raise each
        return result

    return action


@pytest.mark.parametrize("error", [OSError("connection reset"), RuntimeError("HTTP 503")])
def test_what_fails_for_a_moment_is_tried_again_after_growing_waits(waited, error):
    assert with_retries(failing(error, 3), "gs://bucket/file") == "content"
    assert waited == [0.5, 1.0, 2.0]


def test_what_keeps_failing_is_named(waited):
    with pytest.raises(PreparedDataError, match=r"gs://bucket/file cannot be read in 6 tries.*503"):
        with_retries(failing(OSError("HTTP 503"), 99), "gs://bucket/file")
    assert sum(waited) == 15.5


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(), "does not exist"),
        (RuntimeError("open() failed: No such file or directory"), "does not exist"),
        (RuntimeError("Corrupted Riegeli/records file: chunk data hash mismatch"), "is damaged"),
    ],
)
def test_what_no_further_try_can_change_is_named_at_once(waited, error, words):
    with pytest.raises(PreparedDataError, match=f"a/file {words}"):
        with_retries(failing(error, 1), "a/file")
    assert not waited


def test_a_mistake_in_the_code_is_not_tried_again(waited):
    with pytest.raises(ZeroDivisionError):
        with_retries(lambda: 1 // 0, "a/file")
    assert not waited


def test_files_are_read_by_address_as_by_path(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    assert read_file(tmp_path / "file") == b"content"
    assert read_file(f"file://{tmp_path}/file") == b"content"
    for address in (tmp_path / "other", f"file://{tmp_path}/other"):
        with pytest.raises(PreparedDataError, match=f"{address} does not exist"):
            read_file(address)


def test_an_address_of_no_known_kind_is_named(waited):
    with pytest.raises(PreparedDataError, match="pigeon://loft/file cannot be read"):
        read_file("pigeon://loft/file")
    assert waited


@pytest.fixture
def folder(tmp_path):
    write_prepared(tmp_path, "chats", chat_examples(np.random.default_rng(0), 4000, 60))
    return tmp_path / "chats" / "train"


def open_chats(folder):
    return PreparedDataset(folder.parents[1], "chats", "train")


def overwrite(path, start, count):
    content = bytearray(path.read_bytes())
    content[start : start + count] = bytes(255 - byte for byte in content[start : start + count])
    path.write_bytes(content)


@pytest.mark.usefixtures("waited")
def test_a_damaged_shard_is_named_when_what_is_damaged_is_read(folder):
    shard = folder / "examples-00000.arrayrecord"
    whole = [text.chat.tokens.tolist() for text in open_chats(folder).read(range(4000))]
    overwrite(shard, shard.stat().st_size // 2, 20)
    chats = open_chats(folder)
    with pytest.raises(PreparedDataError, match=f"{shard} is damaged: copy it again, .*--redo"):
        chats.read(range(4000))
    # Elsewhere it can still be read.
    assert [text.chat.tokens.tolist() for text in chats.read([3, 1])] == [whole[3], whole[1]]


@pytest.mark.usefixtures("waited")
@pytest.mark.parametrize("left", [0, 70_000])
def test_a_shard_that_was_cut_off_is_named(folder, left):
    shard = folder / "examples-00000.arrayrecord"
    assert shard.stat().st_size > left
    shard.write_bytes(shard.read_bytes()[:left])
    # Who prepares it once more without --redo is told that it is there already.
    with pytest.raises(PreparedDataError, match=rf"{shard}.*--redo"):
        open_chats(folder)


@pytest.mark.usefixtures("waited")
def test_a_shard_that_went_missing_is_named(folder):
    chats = open_chats(folder)
    chats.read([0])
    shard = folder / "examples-00000.arrayrecord"
    shard.unlink()
    with pytest.raises(PreparedDataError, match=f"{shard} does not exist"):
        open_chats(folder)


def test_a_shard_too_few_is_an_error(folder):
    path = folder / "examples-00000.arrayrecord"
    with pytest.raises(PreparedDataError, match=r"4000 examples are left of 4001"):
        RecordReader([path], 4001)


def test_records_are_numbered_through_all_shards(folder):
    path = folder / "examples-00000.arrayrecord"
    records = RecordReader([path, path], 8000)
    assert records.read([4000, 3999, 7, 4007]) == records.read([0, 7999, 7, 7])


@pytest.mark.usefixtures("waited")
def test_there_may_be_more_shards_than_a_shell_allows_open_files(tmp_path):
    chats = chat_examples(np.random.default_rng(0), 60, 9)
    write_prepared(tmp_path, "chats", chats, examples_a_shard=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 30, hard))
    try:
        read = PreparedDataset(tmp_path, "chats", "train").read(range(60))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [len(example.chat) for example in read] == [len(example.chat) for example in chats]


@pytest.mark.usefixtures("waited")
@pytest.mark.parametrize("file", ["manifest.json", "lengths.npz"])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(PreparedDataError, match=f"{folder / file} does not exist"):
        open_chats(folder)


def test_files_of_two_preparations_are_told_apart(folder):
    kept = (folder / "examples-00000.arrayrecord").read_bytes()
    write_prepared(folder.parents[1], "chats", chat_examples(np.random.default_rng(1), 4000, 60))
    (folder / "examples-00000.arrayrecord").write_bytes(kept)
    with pytest.raises(PreparedDataError, match=f"{folder}: example .* not as long as lengths.npz"):
        open_chats(folder).read(range(100))


@pytest.mark.parametrize("left", [b"", b"PK" + bytes(100)])
def test_damaged_lengths_are_named(folder, left):
    (folder / "lengths.npz").write_bytes(left)
    with pytest.raises(PreparedDataError, match=r"lengths.npz is damaged.*--redo"):
        open_chats(folder)


@pytest.mark.parametrize("left", [0, 100])
def test_a_manifest_or_a_mixture_that_was_cut_off_is_named(folder, left):
    manifest, mixture = folder / "manifest.json", folder.parents[1] / "mine.json"
    mixture.write_text(manifest.read_text()[:left])
    with pytest.raises(PreparedDataError, match=r"mine.json is damaged.*grit-jax prepare mine"):
        load_mixture(folder.parents[1], "mine", "train", "generative", "generative")
    manifest.write_text(manifest.read_text()[:left])
    with pytest.raises(PreparedDataError, match=r"manifest.json is damaged"):
        open_chats(folder)


def test_a_missing_mixture_names_the_field_and_the_command(tmp_path):
    with pytest.raises(
        PreparedDataError, match=r"config.data.embedding='mine'.*grit-jax prepare mine"
    ):
        load_mixture(tmp_path, "mine", "train", "embedding", "embedding")
    (tmp_path / "own_embedding.json").write_text("{}")
    (tmp_path / "own_chat.json").write_text("{}")
    with pytest.raises(PreparedDataError, match=r"'mine'.*there are own_chat, own_embedding$"):
        load_mixture(tmp_path, "mine", "train", "embedding", "embedding")
