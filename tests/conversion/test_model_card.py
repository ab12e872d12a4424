"""The model card of an export, and the code in it."""

import json
import re

from huggingface_hub import ModelCard
import pytest

from grit_jax.cli import main
from grit_jax.conversion import open_model
from grit_jax.conversion.model_card import with_name
from grit_jax.conversion.orbax_model import write_orbax

DATA = {
    "seed": 0,
    "embedding": {
        "batches": "homogeneous",
        "batch_size": 16,
        "group_size": 2,
        "datasets": {"faq": {"turns": 3, "contents": "a"}, "wiki": {"turns": 1, "contents": "b"}},
    },
}
CONFIG = {
    "steps": 9,
    "seed": 0,
    "model": {"weights": "someone/base"},
    "loss": {"temperature": 0.02},
    "optimizer": {"learning_rate": 2e-5, "schedule": "linear"},
}


@pytest.fixture(scope="module")
def exported(saved_models, tmp_path_factory):
    """An export of a run of a Llama."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    checkpoint = workdir / "checkpoints" / "7"
    write_orbax(open_model(saved_models["llama"]), checkpoint)
    (checkpoint / "description").mkdir()
    (checkpoint / "description" / "metadata").write_text(json.dumps({"data": DATA}))
    (workdir / "config.json").write_text(json.dumps(CONFIG))
    lines = [
        {"step": 0, "held_out/faq/ndcg_at_10": 0.1},
        {"step": 7, "held_out/faq/ndcg_at_10": 0.625},
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder = workdir.parent / "exported"
    main(["convert", "to-hf", str(workdir), str(folder), "--license", "apache-2.0"])
    return folder


def test_a_card_says_what_the_run_knows(exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.to_dict() == {
        "model_name": "exported",
        "base_model": "someone/base",
        "license": "apache-2.0",
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": [
            "grit-jax",
            "sentence-transformers",
            "sentence-similarity",
            "feature-extraction",
            "text-generation",
        ],
    }
    for line in (
        "| steps | 7 |",
        "| temperature | 0.02 |",
        "| embedding batch size | 16 |",
        "| faq | embedding | 75.0% |",
        "| faq/ndcg_at_10 | 0.625 |",
    ):
        assert line in card.text.splitlines()
    renamed = ModelCard(with_name(card.content, "me/mine"))
    assert renamed.data["model_name"] == "me/mine"
    assert "exported" not in renamed.content


def test_a_card_of_a_folder_has_no_training(saved_models, tmp_path):
    main(["convert", "to-hf", str(saved_models["llama"]), str(tmp_path / "copy")])
    card = ModelCard.load(tmp_path / "copy" / "README.md")
    assert {"base_model", "license", "datasets", "language"}.isdisjoint(card.data.to_dict())
    assert "## Usage" in card.text
    assert "Training" not in card.text and "Results" not in card.text and "None" not in card.text


@pytest.mark.slow
def test_the_code_of_a_card_runs(exported, monkeypatch):
    monkeypatch.chdir(exported.parent)
    card = ModelCard.load(exported / "README.md")
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
