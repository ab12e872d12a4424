"""Datasets of the Hugging Face Hub, and the paper's run as it is typed."""

import json

from command_line import ROOT
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grit_jax import cli
from grit_jax.config import ConfigError
from grit_jax.config_from_data import check_prepared, complete_config
from grit_jax.data.manifest import load_mixture
from grit_jax.from_config import make_batches, make_trainer
from grit_jax.prepare.hub import download_dataset, is_of
from grit_jax.prepare.resolve import find_mixtures
from grit_jax.text.jsonl import SourceError

COMMIT = "0" * 40
CARD = """---
configs:
- config_name: default
  data_files: data/train-*
- config_name: en
  data_files:
  - split: train
    path: [en/train-*, more/en.jsonl]
  - split: test
    path: en/test-*
---
A dataset.
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub's cache, as after a download."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def cached(hub, repository):
    """Returns the folder of a repository's files in the cache."""
    folder = hub / f"datasets--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_configuration_is_the_files_that_the_card_names(hub):
    snapshot = cached(hub, "some/pairs")
    (snapshot / "README.md").write_text(CARD)
    table = pa.Table.from_pylist([{"query": "q", "passage": "p"}])
    names = ("en/train-00000-of-00001", "en/test-00000-of-00001", "data/train-00000-of-00001")
    for name in names:
        (snapshot / name).parent.mkdir(exist_ok=True)
        pq.write_table(table, snapshot / f"{name}.parquet")
    write_lines(snapshot / "more" / "en.jsonl", [{"query": "q", "pos": ["p"]}])

    def datasets(source):
        (mixture,) = find_mixtures([source], [], 0.0, 0)
        return [dataset.name for dataset in mixture.rates]

    assert datasets("hf:some/pairs/en") == ["pairs_en.en_train", "pairs_en.more_en"]
    assert datasets("mine=hf:some/pairs/default") == ["mine.data_train"]
    assert datasets("hf:some/pairs") == ["pairs.data_train", "pairs.en_train", "pairs.more_en"]
    assert datasets("hf:some/pairs/more") == ["pairs_more.more_en"]
    for source, message in (
        ("hf:some/pairs/fr", "hf:some/pairs/fr: there is no such configuration, only default, en"),
        ("hf:pairs", "'hf:pairs' is not hf:OWNER/NAME"),
        ("hf:some/other", "^some/other cannot be downloaded from the Hugging Face Hub"),
    ):
        with pytest.raises(SourceError, match=message):
            find_mixtures([source], [], 0.0, 0)
    assert is_of("a/b/x.jsonl", ["**/*.jsonl"]) and not is_of("a/x.json", ["a/*.jsonl"])
    assert download_dataset("hf:some/pairs/en")[1] == ["en/train-*", "more/en.jsonl"]


NUM_FILES, BATCH_SIZE = 200, 64
CONFIG = [
    f"--config={ROOT / 'configs' / 'gritlm_7b.py'}",
    "--config.model.weights=",  # random, and few
    "--config.model.sizes.hidden_size=32",
    "--config.model.sizes.num_hidden_layers=1",
    f"--config.data.embedding_batch_size={BATCH_SIZE}",
    "--config.data.generative_batch_size=32",
    "--config.loss.generative_group_size=4",
]


def write_published_data(hub):
    """Writes hundreds of small files like MEDI2's, and Tulu 2 in Parquet files."""
    medi2 = cached(hub, "GritLM/MEDI2")
    sizes = [1 + number % 9 for number in range(NUM_FILES)] + [130, 64]
    for number, size in enumerate(sizes):
        instruction = f"Represent the title {number}:"
        write_lines(
            medi2 / f"task_{number:03}.jsonl",
            [
                {
                    "query": [instruction, f"query {n} of {number}"],
                    "pos": [["Represent the text:", f"positive {n}"]],
                    "neg": [["Represent the text:", f"negative {n}"]],
                }
                for n in range(size)
            ],
        )
    tulu2 = cached(hub, "GritLM/tulu2")
    (tulu2 / "data").mkdir()
    roles = ("user", "assistant")
    for shard in range(3):
        rows = [
            {
                "dataset": "hard_coded" if n == 7 else "flan_v2",
                "id": f"flan_{n}",
                "messages": [{"role": role, "content": f"{role} {shard} {n}"} for role in roles],
            }
            for n in range(20)
        ]
        path = tulu2 / "data" / f"train-0000{shard}-of-00003.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=6)
    return sizes


@pytest.mark.slow
def test_the_papers_run_prepares_its_data_and_trains_on_all_of_it(hub, monkeypatch):
    sizes = write_published_data(hub)
    started = []
    monkeypatch.setattr("grit_jax.run.run", lambda config, workdir: started.append(config))
    cli.train(CONFIG)
    command = (
        r"config\.data\.folder='data/gritlm' lacks medi2 and tulu2: add --prepare "
        r"\(with one process\), or run grit-jax prepare medi2=hf:GritLM/MEDI2 "
        r"tulu2=hf:GritLM/tulu2 --output data/gritlm$"
    )
    with pytest.raises(ConfigError, match=command):
        check_prepared(started[0])
    cli.train([*CONFIG, "--prepare"])
    config = complete_config(started[1])
    medi2 = load_mixture("data/gritlm", "medi2", "train", "embedding", "x")
    assert list(medi2.values()) == sizes
    ((tulu2, size),) = load_mixture("data/gritlm", "tulu2", "train", "generative", "x").items()
    assert (tulu2.name, size) == ("tulu2.data_train", 57)

    batches = make_batches(config, make_trainer(config))
    sampler = batches.samplers["embedding"]
    total = sum(sizes[:NUM_FILES])
    sharing = str(sampler.describe_sharing())
    assert sharing.startswith("200 of 202 embedding datasets are too small for batches of their")
    assert f"their {total:,} examples share" in sharing
    steps = 2 * sum(sizes) // BATCH_SIZE
    drawn = [
        draw
        for batch in (sampler[step] for step in range(steps))
        if len(set(batch.datasets.tolist())) > 1
        for draw in zip(
            batch.epochs.tolist(), batch.datasets.tolist(), batch.examples.tolist(), strict=True
        )
    ]
    assert len(drawn) == len(set(drawn)) > 1.8 * total
    expected = {(0, number, n) for number in range(NUM_FILES) for n in range(sizes[number])}
    assert {draw for draw in drawn if draw[0] == 0} == expected
    again = make_batches(config, make_trainer(config))
    for step in (steps, 3):
        first, second = (each.plans[step].sampled["embedding"] for each in (again, batches))
        for name in ("datasets", "examples", "texts"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert batches[5].parts["embedding"].passage_ids.shape == (2 * BATCH_SIZE,)
