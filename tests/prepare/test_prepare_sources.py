"""Preparing users' sources: folders of files, damaged files, collections, TFDS, other runs."""

import functools
import gzip
import json
from pathlib import Path
import signal
import subprocess
import sys
import time

from command_line import (
    COMMAND,
    MAIN,
    assert_fails_in_one_line,
    environment,
    grit_jax,
    grit_jax_in_process,
    run_python,
)
import pytest
from tokenizer_files import write_sentencepiece, write_tokenizer

from grit_jax.data.manifest import PreparedDataset, load_mixture, load_saved_tokenizer
from grit_jax.text.jsonl import is_held_out
from grit_jax.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer()


def pair(number):
    return {"query": ["find it", f"query {number}"], "pos": [["", f"answer {number}"]], "neg": []}


def chat(number):
    return {"text": [f"question {number}", f"answer {number}"]}


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def learned(text):
    return TOKENIZER.decode(text.tokens[text.mask].tolist())


def queries(dataset):
    return [learned(example.query) for example in dataset.read(range(len(dataset)))]


def prepare(*arguments, cwd):
    finished = grit_jax_in_process("prepare", *arguments, cwd=cwd)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


# ---- Folders and files ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's files, prepared with a tenth held out."""
    folder = tmp_path_factory.mktemp("user")
    strings = [{"query": f"word {n}", "pos": [f"sense {n}"], "neg": ["no"]} for n in range(40)]
    write_lines(folder / "My data" / "news & views.jsonl", [pair(n) for n in range(400)])
    write_lines(folder / "My data" / "deep" / "strings.jsonl.gz", strings)
    write_lines(folder / "My data" / "talk.jsonl", [chat(n) for n in range(100)])
    write_lines(folder / "My data" / "tiny.jsonl", [pair(9)])
    broken = next(n for n in range(1000) if is_held_out(str(n).encode(), 0.1, 0))
    write_lines(folder / "My data" / "few.jsonl", [*(pair(n) for n in range(20)), broken])
    prepare("My data", "--held-out", 0.1, "--output", "out", "--processes", 3, cwd=folder)
    return folder


def test_a_folder_of_both_kinds_makes_two_mixtures_with_rates_by_size(folder):
    datasets = load_mixture(folder / "out", "My_data_embedding", "train", "embedding", "x")
    assert {dataset.name: rate for dataset, rate in datasets.items()} == {
        dataset.name: len(dataset) for dataset in datasets
    }
    names = {"My_data.news_views", "My_data.deep_strings", "My_data.tiny", "My_data.few"}
    assert {dataset.name for dataset in datasets} == names
    chats = load_mixture(folder / "out", "My_data_chat", "train", "generative", "x")
    assert [dataset.name for dataset in chats] == ["My_data.talk"]


def test_the_held_out_fraction_is_separate_and_nothing_is_lost(folder):
    train, held_out = (
        queries(PreparedDataset(folder / "out", "My_data.news_views", split))
        for split in ("train", "held_out")
    )
    assert 20 <= len(held_out) <= 60
    assert not set(train) & set(held_out)
    order = [f"query {number}" for number in range(400)]
    assert train == [query for query in order if query in set(train)]
    assert sorted(train + held_out) == sorted(order)


def test_a_dataset_too_small_to_hold_out_a_line_is_all_in_train(folder):
    held_out = load_mixture(folder / "out", "My_data_embedding", "held_out", "embedding", "x")
    assert "My_data.tiny" not in {dataset.name for dataset in held_out}
    assert len(PreparedDataset(folder / "out", "My_data.tiny", "train")) == 1


def test_rejects_among_held_out_lines_count_against_the_whole_file(folder):
    """One reject may be more than a tenth of the few held-out lines of a small file."""
    manifest = PreparedDataset(folder / "out", "My_data.few", "train").manifest
    assert manifest.rejected_lines == {"not a JSON object": ["few.jsonl:21"]}


def test_plain_strings_are_texts_without_instruction(folder):
    dataset = PreparedDataset(folder / "out", "My_data.deep_strings", "train")
    example = dataset.read([0])[0]
    whole = TOKENIZER.decode(example.query.tokens.tolist())
    assert whole == "<|embed|>\n" + learned(example.query)
    assert example.query.tokens[0] == TOKENIZER.bos_id
    assert [learned(text) for text in example.negatives] == ["no"]


@pytest.mark.slow
def test_folders_train_and_held_out_are_the_splits(tmp_path):
    write_lines(tmp_path / "of=me" / "train" / "a.jsonl", [pair(n) for n in range(5)])
    write_lines(tmp_path / "of=me" / "held_out" / "a.jsonl", [pair(7), pair(8)])
    write_lines(tmp_path / "of=me" / "train" / "b.jsonl", [pair(n) for n in range(3)])
    prepare("good=of=me", "--output", "out", cwd=tmp_path)
    assert queries(PreparedDataset(tmp_path / "out", "good.a", "held_out")) == [
        "query 7",
        "query 8",
    ]
    assert len(PreparedDataset(tmp_path / "out", "good.a", "train")) == 5
    held_out = load_mixture(tmp_path / "out", "good", "held_out", "embedding", "x")
    assert [dataset.name for dataset in held_out] == ["good.a"]


# ---- Collections ----


@pytest.mark.slow
def test_published_collections_are_prepared_from_their_own_formats(tmp_path):
    medi2 = {
        "query": ["Represent the title:", "a title"],
        "pos": [["Represent the text:", "a text"]],
        "neg": [["Represent the text:", "another"]],
    }
    e5 = {"query": ["find", "q"], "pos": [["", "p1"], ["", "p2"]], "neg": [["", "n"]] * 3}
    write_lines(tmp_path / "MEDI2" / "task_1.jsonl", [medi2])
    write_lines(tmp_path / "E5S" / "msmarco.jsonl", [e5])
    user, assistant, system = (
        {"role": role, "content": role.upper()} for role in ("user", "assistant", "system")
    )
    tulu2 = [
        {"dataset": "flan_v2", "id": "flan_0", "messages": [system, user, assistant]},
        {"dataset": "hard_coded", "id": "hard_coded_1", "messages": [user, assistant]},
        {"dataset": "sharegpt", "id": "sharegpt_2", "messages": [user, assistant] * 2},
    ]
    write_lines(tmp_path / "tulu" / "train.jsonl", tulu2)
    report = prepare("medi2=MEDI2", "e5=E5S", "tulu2=tulu", "--output", "out", cwd=tmp_path)
    assert "tulu2.train/train: 2 chats, 1 left out, 0 rejected" in report

    def wholes(mixture, kind):
        (dataset,) = load_mixture(tmp_path / "out", mixture, "train", kind, "x")
        examples = dataset.read(range(len(dataset)))
        return [[TOKENIZER.decode(t.tokens.tolist()) for t in e.texts] for e in examples]

    assert wholes("medi2", "embedding") == [
        [
            "<|user|>\nRepresent the title\n<|embed|>\na title",
            "<|user|>\nRepresent the text\n<|embed|>\na text",
            "<|user|>\nRepresent the text\n<|embed|>\nanother",
        ]
    ]
    assert len(wholes("e5", "embedding")[0]) == 6
    assert wholes("tulu2", "generative") == [
        ["<|user|>\nSYSTEM\n\nUSER\n<|assistant|>\nASSISTANT"],
        ["<|user|>\nUSER\n<|assistant|>\nASSISTANT \n<|user|>\nUSER\n<|assistant|>\nASSISTANT"],
    ]


# ---- Damage ----

DAMAGE = {
    "broken JSON": b'{"query": ["", "half',
    "not a JSON object": b"[1, 2]",
    "no 'query'": b'{"title": "x"}',
    "'query' is neither a text nor [instruction, text]": b'{"query": 1, "pos": ["x"]}',
    "'pos' is not a list": b'{"query": "x", "pos": "y"}',
    "'neg' is neither a text nor [instruction, text]": b'{"query": "x", "pos": ["y"], "neg": [2]}',
    "no positive": b'{"query": "x", "pos": []}',
    "empty text": b'{"query": "", "pos": ["x"]}',
    "instruction alone is too long": json.dumps(
        {"query": ["word " * 300, "x"], "pos": ["y"]}
    ).encode(),
    "a chat, not an embedding example": b'{"text": ["u", "a"]}',
    "invalid UTF-8": b'{"query": "\xff\xfe", "pos": ["x"]}',
    "NUL character": b'{"query": "a\0b", "pos": ["x"]}',
    "half of a surrogate pair": b'{"query": "\\ud83d", "pos": ["x"]}',
    "line over 16 MB": b'{"query": "' + b"long " * 20_000_000 + b'", "pos": ["x"]}',
}


def damaged_file(path, good_lines):
    """Writes good lines, then damaged lines of every kind, each followed by a good line."""
    with path.open("wb") as file:
        for number in range(good_lines):
            file.write(json.dumps(pair(number)).encode() + b"\n")
        for number, line in enumerate(DAMAGE.values()):
            file.write(line + b"\n" + json.dumps(pair(good_lines + number)).encode() + b"\r\n\n")


@pytest.mark.slow
def test_every_kind_of_damage_rejects_its_line_and_is_reported(tmp_path):
    damaged_file(tmp_path / "pairs.jsonl", 200)
    report = prepare("pairs.jsonl", "--output", "out", cwd=tmp_path)
    dataset = PreparedDataset(tmp_path / "out", "pairs", "train")
    assert queries(dataset) == [f"query {number}" for number in range(200 + len(DAMAGE))]
    assert dataset.manifest.rejected == dict.fromkeys(DAMAGE, 1)
    lines = {reason: 201 + 3 * number for number, reason in enumerate(DAMAGE)}
    assert dataset.manifest.rejected_lines == {r: [f"pairs.jsonl:{n}"] for r, n in lines.items()}
    stored = (tmp_path / "out" / "pairs" / "train" / "rejected.jsonl").read_text().splitlines()
    assert {line["reason"]: line["line"] for line in map(json.loads, stored)} == lines
    for reason, line in lines.items():
        assert f"1 {reason} (pairs.jsonl:{line}" in report


@pytest.mark.slow
def test_more_damage_than_allowed_fails_in_one_line_and_leaves_nothing(tmp_path):
    damaged_file(tmp_path / "pairs.jsonl", 5)
    write_lines(tmp_path / "language=en" / "fine.jsonl", [pair(1)])
    sources = ("pairs.jsonl", "language=en/fine.jsonl")
    finished = grit_jax_in_process("prepare", *sources, "--output", "out", cwd=tmp_path)
    assert_fails_in_one_line(finished, "out/pairs/train", "14 of 33", "--max-rejected", ":6")
    assert len(PreparedDataset(tmp_path / "out", "fine", "train")) == 1
    assert (tmp_path / "out" / "fine.json").exists()
    assert not (tmp_path / "out" / "pairs.json").exists()
    assert not (tmp_path / "out" / "pairs").exists()
    assert not (tmp_path / "out" / ".incomplete").exists()


@pytest.mark.slow
def test_a_damaged_archive_and_a_file_without_examples_are_named(tmp_path):
    write_lines(tmp_path / "cut" / "a.jsonl.gz", [pair(n) for n in range(2000)])
    content = (tmp_path / "cut" / "a.jsonl.gz").read_bytes()
    (tmp_path / "cut" / "a.jsonl.gz").write_bytes(content[: len(content) // 2])
    finished = grit_jax_in_process("prepare", "cut", "--output", "out", cwd=tmp_path)
    assert_fails_in_one_line(finished, "a.jsonl.gz, after line")
    assert not list((tmp_path / "out").rglob("manifest.json"))
    write_lines(tmp_path / "other.jsonl", [{"title": "x"}])
    finished = grit_jax_in_process("prepare", "other.jsonl", "--output", "out", cwd=tmp_path)
    assert_fails_in_one_line(finished, "other.jsonl", "no row is an example")


@pytest.mark.slow
def test_collections_without_a_folder_and_names_already_taken_are_explained(tmp_path):
    write_lines(tmp_path / "a.jsonl", [pair(1)])
    write_lines(tmp_path / "squad.jsonl", [pair(1)])
    write_lines(tmp_path / "deep" / "a.jsonl", [pair(2)])
    for sources, *named in (
        (["medi2"], "medi2=FOLDER"),
        (["sample_chat", "--tokenizer", "long" * 99], "OSError", "too long"),
        (["sample_chat=a.jsonl"], "there is a mixture 'sample_chat' already"),
        (["squad.jsonl"], "there is a dataset 'squad' already", "=squad.jsonl"),
        (["a.jsonl", "deep/a.jsonl"], "two sources are both called 'a'", "OTHER_NAME="),
        (["tokenizers=a.jsonl"], "no dataset can be called 'tokenizers'"),
        (["nowhere/at_all"], "nowhere/at_all: no such file or folder"),
    ):
        finished = grit_jax_in_process("prepare", *sources, "--output", "out", cwd=tmp_path)
        assert_fails_in_one_line(finished, *named)
    options = ("--held-out", 1.5, "--output", "out")
    finished = grit_jax_in_process("prepare", "a.jsonl", *options, cwd=tmp_path)
    assert finished.returncode == 2 and "1.5 is not between 0 and 1" in finished.stderr
    assert not (tmp_path / "out").exists()


# ---- Again ----


def prepare_again(folder, tokenizer, length, *options):
    """Prepares two files, and returns the report."""
    options = ("--tokenizer", tokenizer, "--query-length", length, "--processes", 1, *options)
    return prepare("a.jsonl", "b.jsonl", "--output", "out", *options, cwd=folder)


@pytest.mark.slow
def test_only_what_has_changed_is_prepared_again(tmp_path):
    def shards():
        return {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*.arrayrecord")}

    again = functools.partial(prepare_again, tmp_path)
    write_lines(tmp_path / "a.jsonl", [pair(n) for n in range(10)])
    write_lines(tmp_path / "b.jsonl", [pair(n) for n in range(10)])
    again("mistral", 64)
    first = shards()
    (tmp_path / "a.jsonl").touch()
    report = ["out/a: up to date", "out/b: up to date", "out: prepared a, b"]
    assert again("mistral", 64).splitlines() == report
    assert shards() == first

    write_lines(tmp_path / "b.jsonl", [pair(n) for n in range(11)])
    report = again("mistral", 64)
    assert "out/a: up to date" in report and "out/b: prepared again (changed source)" in report
    assert len(PreparedDataset(tmp_path / "out", "b", "train")) == 11
    assert json.loads((tmp_path / "out" / "b.json").read_text())["rates"] == {"b": 11}
    assert "out/a: prepared again (changed options)" in again("mistral", 65)

    write_sentencepiece(tmp_path, 300, byte_fallback=True)
    assert "out/a: prepared again (changed tokenizer)" in again("other.model", 65)
    (tmp_path / "out" / "a" / "train" / "lengths.npz").unlink()
    report = again("other.model", 65)
    assert "out/a: prepared again (incomplete)" in report and "out/b: up to date" in report
    assert "up to date" not in again("other.model", 65, "--redo")

    tokenizer = Tokenizer(str(write_tokenizer(tmp_path, "smollm")))
    assert "out/b: prepared again (changed tokenizer)" in again("tokenizer.json", 65)
    dataset = PreparedDataset(tmp_path / "out", "b", "train")
    assert dataset.manifest.tokenizer == {
        "name": "tokenizer.json",
        "sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "files": ["tokenizer.json", "tokenizer_config.json"],
    }
    query = dataset.read([0])[0].query
    assert tokenizer.decode(query.tokens[query.mask].tolist()) == "query 0"
    # It is saved with the data, which may be used on another machine.
    for path in (tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"):
        path.unlink()
    kept = load_saved_tokenizer(dataset)
    assert (kept.fingerprint, kept.bos_id) == (tokenizer.fingerprint, tokenizer.bos_id)


KILLING = """
import os, signal, time
from pathlib import Path
from grit_jax.prepare.datasets import add_dataset, add_mixture


def kill(raw):
    if raw["query"][1] == "query 7":
        os.kill(os.getpid(), signal.SIGKILL)
    return raw


def wait(raw):
    Path(f"worker-{os.getpid()}").touch()
    time.sleep(600)


def fails(raw):
    text = raw["query"][1]
    if text == "query 5":
        raise KeyError(text)
    wrong = {"query 6": True, "query 7": {}}
    return wrong.get(text, {**raw, "query": [PREFIX, text]})


PREFIX = "Another instruction"
for function in (kill, wait, fails):
    name = function.__name__
    add_dataset(name, "embedding", "pairs.jsonl", preprocess=function)
    add_mixture(name, {name: 1.0})
"""


@pytest.fixture
def killing(tmp_path):
    (tmp_path / "killing.py").write_text(KILLING)
    write_lines(tmp_path / "pairs.jsonl", [pair(n) for n in range(10)])
    return tmp_path


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_in_one_line(killing):
    sources = ("pairs.jsonl", "kill", "--module", "killing", "--output", "out")
    finished = grit_jax("prepare", *sources, cwd=killing)
    assert_fails_in_one_line(finished, "ended abruptly", "again")
    assert not (killing / "out" / "kill").exists()
    assert not (killing / "out" / ".incomplete").exists()


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_no_process_and_nothing_that_looks_prepared(killing):
    arguments = ["prepare", "wait", "--module", "killing", "--output", "out"]
    command = [*COMMAND, *arguments]
    with subprocess.Popen(
        command,
        cwd=killing,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as running:
        workers = wait_for(lambda: list(killing.glob("worker-*")))
        finished = grit_jax("prepare", "pairs.jsonl", "--output", "out", cwd=killing)
        assert_fails_in_one_line(finished, "another grit-jax prepare is running")
        running.send_signal(signal.SIGKILL)
    for worker in workers:
        pid = int(worker.name.removeprefix("worker-"))
        wait_for(lambda pid=pid: not is_running(pid))
    assert not list((killing / "out").glob("*.json"))
    assert not (killing / "out" / "wait").exists()
    prepare("pairs.jsonl", "--output", "out", cwd=killing)
    assert sorted(path.name for path in (killing / "out").iterdir()) == [
        ".lock",
        "pairs",
        "pairs.json",
        "tokenizers",
    ]


@pytest.mark.slow
def test_an_interrupted_run_ends_at_once_in_one_line(killing):
    # As in a terminal: a background process of a shell ignores the signal.
    script = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {MAIN}"
    command = [sys.executable, "-c", script, "prepare", "pairs.jsonl", "wait"]
    command += ["--module", "killing", "--output", "out"]
    with subprocess.Popen(
        command, cwd=killing, env=environment(), stderr=subprocess.PIPE, text=True
    ) as running:
        wait_for(lambda: list(killing.glob("worker-*")))
        running.send_signal(signal.SIGINT)
        message = running.stderr.read()
    assert running.returncode == 2
    assert message.splitlines()[-1].startswith("interrupted; finished datasets stay")
    assert not (killing / "out" / "wait").exists()
    assert not (killing / "out" / ".incomplete").exists()


def wait_for(condition):
    for _ in range(6000):
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("timed out")


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_an_error_in_preprocess_rejects_the_line(killing):
    arguments = ("--module", "killing", "--max-rejected", 0.5, "--output", "out")
    prepare("fails", *arguments, cwd=killing)
    dataset = PreparedDataset(killing / "out", "fails", "train")
    assert dataset.manifest.rejected_lines == {
        "preprocess raised KeyError": ["pairs.jsonl:6"],
        "preprocess returned a bool": ["pairs.jsonl:7"],
        "no 'query'": ["pairs.jsonl:8"],
    }
    whole = TOKENIZER.decode(dataset.read([0])[0].query.tokens.tolist())
    assert whole == "<|user|>\nAnother instruction\n<|embed|>\nquery 0"


# ---- seqio ----

QUESTIONS = '''
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
from grit_jax.prepare.seqio_tasks import add_task, by_size, jsonl_source, squad_example


class TinyQuestions(tfds.core.GeneratorBasedBuilder):
    """Questions and the paragraphs that answer them."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        texts = {name: tfds.features.Text() for name in ("question", "context")}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(texts))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(5), "validation": self._generate_examples(2)}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"question": f"question {number}?", "context": f"paragraph {number} é"}


def numbers(split, shuffle_files, seed=None):
    texts = tf.data.Dataset.range(5000 if split == "train" else 3)
    return texts.map(lambda n: {"text": [tf.strings.as_string(n), tf.strings.as_string(2 * n)]})


splits = {"train": "train", "held_out": "validation"}
source = seqio.TfdsDataSource("tiny_questions:1.0.0", tfds_data_dir="tfds", splits=splits)
add_task("questions", "embedding", source, [squad_example])
add_task("lines", "embedding", jsonl_source("embedding", "pairs.jsonl"))
add_task("numbers", "generative", seqio.FunctionDataSource(numbers, splits=["train", "held_out"]))
seqio.MixtureRegistry.add("questions", [("questions", by_size), ("lines", 3.0)])
seqio.MixtureRegistry.add("numbers", [("numbers", 1.0)])
'''


PREPARE_TWICE = """
import sys
from grit_jax.cli import main

for _ in range(2):
    main(["prepare", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_any_seqio_source_is_prepared_including_tfds(tmp_path):
    (tmp_path / "questions.py").write_text(QUESTIONS)
    write_lines(tmp_path / "pairs.jsonl", [pair(n) for n in range(10)])
    # Each process loads TensorFlow.
    sources = ("questions", "numbers", "--module", "questions", "--processes=1")
    finished = run_python(PREPARE_TWICE, *sources, "--output", "out", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("up to date") == 3
    rates = load_mixture(tmp_path / "out", "questions", "train", "embedding", "x")
    assert {dataset.name: rate for dataset, rate in rates.items()} == {"questions": 5, "lines": 3}
    (held_out,) = load_mixture(tmp_path / "out", "questions", "held_out", "embedding", "x")
    assert sorted(queries(held_out)) == ["question 0?", "question 1?"]
    example = held_out.read([queries(held_out).index("question 1?")])[0]
    assert TOKENIZER.decode(example.query.tokens.tolist()) == (
        "<|user|>\nGiven a question, retrieve the Wikipedia paragraph that answers it\n"
        "<|embed|>\nquestion 1?"
    )
    assert [learned(text) for text in example.positives] == ["paragraph 1 é"]
    assert example.negatives == []
    numbers = PreparedDataset(tmp_path / "out", "numbers", "train")
    assert [learned(e.chat) for e in numbers.read([0, 4_099, 4_999])] == ["0", "8198", "9998"]
    with (tmp_path / "questions.py").open("a") as file:
        file.write("# A change.\n")
    module = (tmp_path / "questions.py").read_text().replace('"train",', '"train[:4]",')
    (tmp_path / "questions.py").write_text(module)
    finished = grit_jax("prepare", *sources, "--output", "out", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "numbers: prepared again (changed source)" in finished.stdout
    assert "questions: prepared again (changed source)" in finished.stdout
    assert len(PreparedDataset(tmp_path / "out", "questions", "train")) == 4


SEQIO = """
import json
import seqio
import tensorflow_datasets as tfds
from grit_jax.prepare import seqio_tasks as tasks

tasks.add_task("lines", "embedding", tasks.jsonl_source("embedding", "pairs.jsonl", held_out=0.3))
task = seqio.TaskRegistry.get("lines")
found = {}
for split in task.splits:
    examples = task.get_dataset(split=split, shuffle=False).as_numpy_iterator()
    found[split] = [example["query"][1].decode() for example in examples]
with tfds.testing.mock_data(num_examples=3):
    squad = seqio.TaskRegistry.get("squad")
    raw = squad.source.get_dataset(split="held_out", shuffle=False)
    for example in squad.preprocessors[0](raw).as_numpy_iterator():
        shapes = {name: example[name].shape for name in ("query", "pos", "neg")}
        found.setdefault("squad", []).append(shapes)
# The checksums for downloading it are in TFDS, and need no network.
found["files"] = sorted(url.rpartition("/")[2] for url in tfds.builder("squad").url_infos)
try:
    tasks.add_task("both", "embedding", tasks.jsonl_source("embedding", "pairs.jsonl"), [print])
    tasks.dataset_of_task(seqio.TaskRegistry.get("both"))
except tasks.SourceError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_seqio_yields_the_examples_that_are_prepared(tmp_path):
    write_lines(tmp_path / "pairs.jsonl", [pair(n) for n in range(50)])
    with (tmp_path / "pairs.jsonl").open("a") as file:
        file.write("broken\n")
    finished = run_python(SEQIO, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    prepare("lines=pairs.jsonl", "--held-out", 0.3, "--output", "out", cwd=tmp_path)
    for split in ("train", "held_out"):
        assert queries(PreparedDataset(tmp_path / "out", "lines", split)) == found[split]
    assert found["squad"] == [{"query": [2], "pos": [1, 2], "neg": [0, 2]}] * 3
    assert {"train-v1.1.json", "dev-v1.1.json"} <= set(found["files"])
    assert "jsonl_source(..., preprocess=function)" in found["error"]
