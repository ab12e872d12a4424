"""Preparing: a user's own datasets become folders that are complete or absent."""

import dataclasses
import json
from pathlib import Path

from command_line import (
    MAIN,
    ROOT,
    assert_fails_in_one_line,
    grit_jax_in_process,
    run_python,
    with_full_disk,
)
from etils import epath
import numpy as np
from prepared_data import write_prepared
import pytest

from grit_jax.data.manifest import PreparedDataError, PreparedDataset, load_mixture
from grit_jax.prepare import writing
from grit_jax.text.examples import ChatExample, Text
from grit_jax.text.tokenizer import Tokenizer

MODULE = """
from pathlib import Path

from grit_jax.prepare.datasets import add_dataset, add_mixture

FOLDER = Path(__file__).parent


def dataset(name, kind):
    return add_dataset(name, kind, {"train": FOLDER / f"{name}.jsonl"})


add_mixture("mine", {dataset("pairs", "embedding"): 0.75, dataset("more", "embedding"): 0.25})
add_mixture("my_chats", {dataset("chats", "generative"): 1.0})
add_mixture("useless", {dataset("useless_pairs", "embedding"): 1.0})
"""


def pair(query, positives=("yes",), negatives=(), instruction="Find it"):
    return {
        "query": [instruction, query],
        "pos": [["", text] for text in positives],
        "neg": [["", text] for text in negatives],
    }


FILES = {
    "pairs": [
        pair("first", ["a", "b"], ["c"]),
        pair(" "),
        pair("second", negatives=["d", "e", "f"]),
        pair("without an answer", positives=[]),
        pair("with an empty negative", negatives=["ok", ""]),
        pair("with much to obey", instruction="word " * 50),
        pair("ünï 日本語 🙂"),
    ],
    "more": [
        {**pair("other", ["word " * 30], instruction="Another:"), "id": 3},
        {**pair("twice", negatives=["yes", "no"], instruction="Another"), "score": None},
    ],
    "chats": [
        {"text": ["hello", "world"]},
        {"text": ["alone"]},
        {"text": ["hello", "world", "again", "and again"]},
        {"text": ["word " * 100, "too late"]},
    ],
    "useless_pairs": [pair(""), pair("x", positives=[])],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A user's folder: a module that declares datasets, and their files."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "my_datasets.py").write_text(MODULE, encoding="utf-8")
    for name, lines in FILES.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(project):
    output = project / "prepared"
    names = ("mine", "my_chats", "--module", "my_datasets", "--output", output)
    lengths = ("--query-length", 40, "--passage-length", 16, "--chat-length", 48)
    finished = grit_jax_in_process("prepare", *names, *lengths, "--max-rejected", 1, cwd=project)
    assert finished.returncode == 0, finished.stderr
    (output / "report.txt").write_text(finished.stdout)
    return output


def test_a_users_own_datasets_can_be_read_as_a_mixture(prepared):
    rates = load_mixture(prepared, "mine", "train", "embedding", "embedding")
    assert {dataset.name: rate for dataset, rate in rates.items()} == {"pairs": 0.75, "more": 0.25}
    pairs = next(dataset for dataset in rates if dataset.name == "pairs")
    tokenizer = Tokenizer()

    def pooled(text):
        return tokenizer.decode(text.tokens[text.mask].tolist())

    examples = pairs.read(range(len(pairs)))
    texts = [[pooled(text) for text in example.texts] for example in examples]
    assert texts == [
        ["first", "a", "b", "c"],
        ["second", "yes", "d", "e", "f"],
        ["ünï 日本語 🙂", "yes"],
    ]
    assert [len(example.positives) for example in examples] == [2, 1, 1]
    for number, example in enumerate(examples):
        assert pairs.lengths[number].tolist() == [len(text) for text in example.texts]
        assert pairs.lengths.num_positives[number] == len(example.positives)


def test_rejects_are_counted_by_their_reason(prepared):
    manifest = json.loads((prepared / "pairs" / "train" / "manifest.json").read_text())
    assert manifest["rejected"] == {
        "empty text": 2,
        "no positive": 1,
        "instruction alone is too long": 1,
    }
    assert manifest["count"] == 3
    chats = json.loads((prepared / "chats" / "train" / "manifest.json").read_text())
    assert chats["rejected"] == {
        "a chat without an answer": 1,
        "prompt alone is too long": 1,
    }
    assert chats["count"] == 2
    lines = (prepared / "chats" / "train" / "rejected.jsonl").read_text().splitlines()
    too_long = json.loads(lines[-1])
    tokenizer = Tokenizer()
    tokens = 1 + len(tokenizer.encode("<|user|>\n" + "word " * 100 + "\n<|assistant|>\n"))
    assert too_long == {
        **{"file": too_long["file"], "line": 4, "reason": "prompt alone is too long"},
        **{"tokens": tokens, "limit": 47},
    }
    report = (prepared / "report.txt").read_text()
    assert f"too long (chats.jsonl:4, up to {tokens} of 47 tokens)" in report


def test_cut_texts_instructions_and_what_is_not_read_are_recorded_and_reported(prepared):
    tokenizer = Tokenizer()
    whole = 1 + len(tokenizer.encode("<|embed|>\n" + "word " * 30))
    manifest = PreparedDataset(prepared, "more", "train").manifest
    lengths = manifest.token_lengths
    assert manifest.cut == {
        "query": {"texts": 0, "tokens": 0, "longest": manifest.longest["query"]},
        "passage": {"texts": 1, "tokens": whole - 16, "longest": whole},
    }
    assert manifest.instructions == {
        "query": {"count": 1, "first": ["Another"]},
        "passage": {"count": 1, "first": [""]},
    }
    assert manifest.notes == {"a negative that is also a positive is left out": 1}
    total = lengths["passage"]["sum"] + whole - 16
    expected = [
        f"{prepared}/more/train: 2 embedding examples, 0 rejected",
        f"  cut: 1 of 3 (33%) passage texts, losing {whole - 16} of {total} "
        f"({(whole - 16) / total:.0%}) tokens; --passage-length {whole} keeps all",
        "  1 of 2 lines: a negative that is also a positive is left out",
        "  fields that are not read: id, score",
    ]
    assert "\n".join(expected) in (prepared / "report.txt").read_text()
    chats = PreparedDataset(prepared, "chats", "train").manifest
    assert chats.instructions == {} and set(chats.cut) == {"chat"}
    assert f"{prepared}/chats/train: 2 chats, 2 rejected" in (prepared / "report.txt").read_text()


def test_the_manifest_says_what_the_data_were_made_from(prepared):
    dataset = PreparedDataset(prepared, "chats", "train")
    longest = max(len(example.chat) for example in dataset.read(range(len(dataset))))
    manifest = dataset.manifest
    assert manifest.longest == {"chat": longest}
    assert manifest.options == {
        "query_length": 40,
        "passage_length": 16,
        "chat_length": 48,
        "chat_labels": "corrected",
        "chat_template": "",
        "embedding_template": "grit",
    }
    tokenizer = Tokenizer()
    assert manifest.tokenizer == {
        "name": "mistral",
        "sha256": tokenizer.fingerprint,
        "vocab_size": 32_000,
        "bos_id": 1,
        "eos_id": 2,
        "files": ["tokenizer.model"],
    }


def test_the_embedded_sample_loses_no_example(prepared_sample):
    manifests = sorted(prepared_sample.glob("*/*/manifest.json"))
    assert len(manifests) == 8
    for path in manifests:
        assert json.loads(path.read_text())["rejected"] == {}, path
    rates = load_mixture(prepared_sample, "sample_chat", "held_out", "generative", "generative")
    assert {dataset.name: rate for dataset, rate in rates.items()} == {
        "wordnet_chat": 0.75,
        "jargon_chat": 0.25,
    }


# ---- Errors ----


def test_an_unknown_mixture_is_named_with_those_that_exist(project, tmp_path):
    finished = grit_jax_in_process("prepare", "nonsense", "--output", tmp_path / "out", cwd=project)
    assert_fails_in_one_line(finished, "'nonsense'", "sample_chat", "sample_embedding")
    assert not (tmp_path / "out").exists()


def test_a_module_that_is_not_there_is_named(project, tmp_path):
    names = ("mine", "--module", "my_datasetz.mine", "--output", tmp_path / "out")
    finished = grit_jax_in_process("prepare", *names, cwd=project)
    assert_fails_in_one_line(finished, "my_datasetz")
    assert "pip install" not in finished.stderr, "there is no package of that name"


def test_a_dataset_without_a_usable_line_is_named(project, tmp_path):
    names = ("useless", "--module", "my_datasets", "--output", tmp_path / "out")
    finished = grit_jax_in_process("prepare", *names, cwd=project)
    assert_fails_in_one_line(finished, "useless_pairs/train", "not one of 2 examples")
    assert not list(tmp_path.rglob("*.json"))


def write(folder, count, examples_a_shard=100):
    """Writes a dataset of chats of 1, 2, ... tokens."""
    texts = [
        Text(np.arange(1, length + 1, dtype=np.int32), np.ones(length, bool))
        for length in range(1, count + 1)
    ]
    write_prepared(folder, "chats", [ChatExample(text) for text in texts], examples_a_shard)


class Interrupted(Exception):
    """Simulates a power failure."""


def test_an_interrupted_write_leaves_the_old_dataset_and_nothing_else(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(writing.np, "savez", interrupt)
        with pytest.raises(Interrupted):
            write(tmp_path, 3)
    with pytest.raises(PreparedDataError, match="does not exist"):
        PreparedDataset(tmp_path, "chats", "train")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    write(tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr(writing.np, "savez", interrupt)
        with pytest.raises(Interrupted):
            write(tmp_path, 5)
    assert len(PreparedDataset(tmp_path, "chats", "train")) == 3
    write(tmp_path, 5)
    assert len(PreparedDataset(tmp_path, "chats", "train")) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["chats"]


@pytest.mark.slow
def test_a_full_disk_is_named_in_one_line(project, tmp_path):
    arguments = ("prepare", "pairs.jsonl", "--output", tmp_path / "out")
    finished = run_python(with_full_disk(MAIN, 100_000), *arguments, cwd=project)
    assert_fails_in_one_line(finished, f"{tmp_path}/out cannot be written", "File too large")


WRITE_SHARD = """
from pathlib import Path
import numpy as np
from grit_jax.text.examples import ChatExample, Text
from grit_jax.prepare.writing import write_shard

tokens = np.random.default_rng(0).integers(2**16, size=10_000).astype(np.int32)
try:
    write_shard(Path("shards"), 0, [ChatExample(Text(tokens, tokens > 0))])
except OSError as error:
    print(error)
"""


def test_a_full_disk_raises_oserror_from_a_shard(tmp_path):
    finished = run_python(with_full_disk(WRITE_SHARD, 10_000), cwd=tmp_path)
    assert "File too large; writing shards/examples-00000" in finished.stdout, finished.stderr


def test_on_a_bucket_a_dataset_is_copied_with_its_manifest_last(tmp_path, monkeypatch):
    """A local folder stands for the bucket: the same files are copied in the same order."""
    write(tmp_path, 3)
    monkeypatch.setattr(writing, "is_remote", lambda path: True)
    copied = []
    where = type(epath.Path(tmp_path))
    copy = where.copy

    def note(path, target, *arguments):
        copied.append(Path(target).name)
        assert not (tmp_path / "chats" / "train" / "manifest.json").exists()
        return copy(path, target, *arguments)

    monkeypatch.setattr(where, "copy", note)
    write(tmp_path, 5, examples_a_shard=2)
    assert len(copied) == 6 and copied[-1] == "manifest.json"
    dataset = PreparedDataset(tmp_path, "chats", "train")
    assert [len(example.chat) for example in dataset.read(range(5))] == [1, 2, 3, 4, 5]


def test_examples_are_read_from_several_shards(tmp_path):
    write(tmp_path, 5, examples_a_shard=2)
    dataset = PreparedDataset(tmp_path, "chats", "train")
    assert len(dataset.manifest.shards) == 3
    assert [len(example.chat) for example in dataset.read([4, 0, 2, 3, 1])] == [5, 1, 3, 4, 2]
    assert [dataset.lengths[number].tolist() for number in (4, 0, 2)] == [[5], [1], [3]]


@pytest.mark.parametrize("file", ["examples-00000.arrayrecord", "lengths.npz", "manifest.json"])
def test_a_missing_file_is_named(tmp_path, file):
    write(tmp_path, 3)
    path = tmp_path / "chats" / "train" / file
    path.unlink()
    with pytest.raises(PreparedDataError) as error:
        PreparedDataset(tmp_path, "chats", "train")
    assert str(path) in str(error.value)


def test_a_dataset_of_another_format_is_not_read(tmp_path):
    write(tmp_path, 3)
    path = tmp_path / "chats" / "train" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 0}))
    with pytest.raises(PreparedDataError, match=r"manifest\.json is of another version"):
        PreparedDataset(tmp_path, "chats", "train")


def test_a_mixture_of_the_other_kind_names_the_field(tmp_path):
    write(tmp_path, 3)
    (tmp_path / "talk.json").write_text(json.dumps({"rates": {"chats": 1.0}}))
    with pytest.raises(PreparedDataError, match=r"config\.data\.embedding='talk'.*generative"):
        load_mixture(tmp_path, "talk", "train", "embedding", "embedding")


def test_a_dataset_without_held_out_examples_is_not_in_that_split(tmp_path):
    write(tmp_path, 3)
    stored = {"rates": {"chats": 1.0, "more": 1.0}, "splits": {"chats": ["train"], "more": []}}
    (tmp_path / "talk.json").write_text(json.dumps(stored))
    datasets = load_mixture(tmp_path, "talk", "train", "generative", "generative")
    assert [dataset.name for dataset in datasets] == ["chats"]
    with pytest.raises(
        PreparedDataError, match=r"no dataset of .*talk\.json has a split 'held_out'"
    ):
        load_mixture(tmp_path, "talk", "held_out", "generative", "generative")


PREPARES = """
import sys
from grit_jax.cli import main

main(["prepare", "more.jsonl", "sample_chat", "--output", sys.argv[1], "--processes", "1"])
import grit_jax.prepare.worker
print(*{name.partition(".")[0] for name in sys.modules})
"""


def test_preparing_files_and_the_sample_loads_neither_jax_nor_tensorflow(project, tmp_path):
    finished = run_python(PREPARES, tmp_path / "out", cwd=project)
    assert finished.returncode == 0, finished.stderr
    written = {path.name for path in (tmp_path / "out").glob("*.json")}
    assert written == {"more.json", "sample_chat.json"}
    loaded = set(finished.stdout.splitlines()[-1].split())
    assert {"grit_jax", "sentencepiece"} <= loaded
    assert not loaded & {"jax", "flax", "grain", "tensorflow", "tensorflow_datasets", "seqio"}


WITHOUT_SEQIO = """
import sys
from grit_jax.cli import main

sys.modules["seqio"] = sys.modules["tensorflow"] = None  # Importing them fails.
main(["prepare", *sys.argv[1:]])
"""


def test_without_seqio_only_what_needs_it_is_refused(project, tmp_path):
    arguments = ("--output", tmp_path / "out", "--processes", 1)
    mine = ("my_chats", "--module", "my_datasets", "--max-rejected", 1)
    finished = run_python(WITHOUT_SEQIO, *mine, *arguments, cwd=project)
    assert finished.returncode == 0, finished.stderr
    finished = run_python(WITHOUT_SEQIO, "squad_embedding", *arguments, cwd=project)
    assert_fails_in_one_line(finished, "needs the package seqio: pip install 'grit-jax[data]'")


def test_training_never_loads_tensorflow(tmp_path):
    script = (
        "import sys, train, grit_jax.run, grit_jax.prepare.prepare, grit_jax.data.batches\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    finished = run_python(script, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    loaded = set(finished.stdout.split())
    assert {"grit_jax", "jax", "grain"} <= loaded
    assert not loaded & {"tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "torch"}


def test_a_manifest_survives_a_round_trip(tmp_path):
    write(tmp_path, 3)
    stored = json.loads((tmp_path / "chats" / "train" / "manifest.json").read_text())
    manifest = PreparedDataset(tmp_path, "chats", "train").manifest
    assert dataclasses.asdict(manifest) == stored
