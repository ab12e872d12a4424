"""A clone after `make demo`, with smaller models, and the files that each page expects."""

import gzip
import itertools
import json
import os
import shutil

from documents import ROOT, Reader
import pytest
from tpu_scripts.conftest import QUICK, Pod

from grit_jax.sample import SAMPLE_FOLDER

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "HF_HUB_OFFLINE": "1",
    # A single device.
    "XLA_FLAGS": "",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}

# Fields that make the clone's configurations small enough for a CPU.
SMALLER_TINY = {
    "steps": 1,
    "log_every_steps": 1,
    "model.sizes.hidden_size": 32,
    "model.sizes.intermediate_size": 32,
    "model.sizes.head_dim": 8,
    "data.embedding_batch_size": 16,
    "evaluation.enabled": False,  # tested in tests/training/test_run.py
}
SMALLER_7B = {
    "steps": 1,
    "model.dtype": "float32",  # faster than bfloat16 on CPUs
    "data.embedding_batch_size": 16,
    "data.generative_batch_size": 8,
    "data.query_row_length": 512,
    "data.passage_row_length": 512,
    "data.chat_row_length": 512,
    "data.row_length_multiple": 8,
}
# Folders that other pages expect, by the page that creates them.
CREATED = {
    "first_steps.md": ["data/mine", "exported"],
    "data.md": ["data/mine"],
    "training.md": ["exported"],
    "conversion.md": ["exported"],
    "pods.md": ["data/mine"],
}
CONFIGURATIONS = {"gritlm_tiny": SMALLER_TINY, "gritlm_7b": SMALLER_7B}
CONFIGURATION = """
import runpy

def get_config():
    config = runpy.run_path({path!r})["get_config"]()
    with config.unlocked():
        config.update_from_flattened_dict({fields!r})
    return config
"""


def sample_lines(name, count):
    with gzip.open(SAMPLE_FOLDER / "train" / f"{name}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in itertools.islice(file, count)]


def as_messages(line):
    roles = itertools.cycle(("user", "assistant"))
    return {
        "messages": [{"role": r, "content": t} for r, t in zip(roles, line["text"], strict=False)]
    }


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_user_files(folder):
    """Writes the files that the pages take as given."""
    words, chats = sample_lines("wordnet_senses", 160), sample_lines("wordnet_chat", 80)
    write_lines(folder / "mine" / "words.jsonl", words)
    write_lines(folder / "mine" / "chats.jsonl", map(as_messages, chats))
    write_lines(folder / "toy_data" / "toy_data_embedding.jsonl", words)
    write_lines(folder / "toy_data" / "toy_data_generative.jsonl", chats)
    write_lines(folder / "MEDI2" / "task.jsonl", words)
    write_lines(folder / "tulu-v2-sft-mixture" / "train.jsonl", map(as_messages, chats))
    questions = [{"question": f"What is {n}?", "answers": [f"It is {n}."]} for n in range(80)]
    write_lines(folder / "faq.jsonl", questions)
    documents = [{"title": "The sea", "text": "No state owns it."}, {"text": "Bread is of flour."}]
    write_lines(folder / "documents" / "pages.jsonl", documents)
    (folder / "documents" / "notes.md").write_text("A river bank is land beside water.\n")


def write_configurations(folder):
    folder.mkdir()
    for name, fields in CONFIGURATIONS.items():
        path = str(ROOT / "configs" / f"{name}.py")
        (folder / f"{name}.py").write_text(CONFIGURATION.format(path=path, fields=fields))


@pytest.fixture(scope="session")
def clone(tmp_path_factory, prepared_sample):
    """The folder of a clone after `make demo`."""
    folder = tmp_path_factory.mktemp("documents") / "clone"
    folder.mkdir()
    write_configurations(folder / "configs")
    write_user_files(folder)
    link_prepared(prepared_sample, folder / "data" / "sample", "sample")
    link_prepared(prepared_sample, folder / "data" / "mine", "mine")
    reader = Reader(folder, environment_of(clone=folder))
    # Mark installation and preparation as done.
    for mark in (".venv/.installed-demo", "data/sample/.prepared"):
        (folder / mark).touch()
    export = ".venv/bin/grit-jax convert to-hf runs/gritlm_tiny exported"
    finished = reader.run_shell(f"make demo && {export} && cp -r exported Mistral-7B-v0.1")
    assert finished.returncode == 0, finished.stderr
    (folder / "GritLM-7B").symlink_to("exported")
    return folder


def environment_of(clone):
    """Caches are shared by all pages and stay out of the home folder."""
    folders = {
        "JAX_COMPILATION_CACHE_DIR": "compiled",
        "HF_HOME": "hugging_face",
        "MTEB_CACHE": "mteb",
    }
    return ENVIRONMENT | {name: str(clone.with_name(folder)) for name, folder in folders.items()}


def link_prepared(sample, folder, name):
    """Creates a folder with the prepared sample's datasets, in mixtures with another name."""
    folder.mkdir(parents=True)
    for path in sample.iterdir():
        if path.is_dir():
            (folder / path.name).symlink_to(path)
        elif path.suffix == ".json":
            shutil.copy(path, folder / path.name.replace("sample", name))


@pytest.fixture
def reader(clone, tmp_path, page):
    """A reader in a copy of the clone, without the folders that the page creates."""
    folder, environment, pod = tmp_path / "clone", environment_of(clone), None
    if page.name == "pods.md":  # needs an emulated Google Cloud and a git clone
        pod = Pod(tmp_path)
        pod.change_cloud(zones={"us-east5-b": ["v6e-64"]}, devices=64)
        path = f"{pod.cloud / 'bin'}:{os.environ['PATH']}"
        environment |= QUICK | {"CLOUD": str(pod.cloud), "PATH": path}
    already = {".venv", *(path.name for path in folder.glob("*"))}
    shutil.copytree(
        clone, folder, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*already)
    )
    for name in CREATED.get(page.name, []):
        shutil.rmtree(folder / name)
    reader = Reader(folder, environment)
    (folder / ".venv" / ".installed-demo").touch()
    yield reader
    reader.stop()
    if pod is not None:
        pod("delete")
        pod.assert_nothing_is_left()
