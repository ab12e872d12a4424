"""Whole runs through train.py, as a user starts them: real processes, real files."""

import json
import os
from pathlib import Path
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from grit_jax.conversion import open_model

ROOT = Path(__file__).parents[2]
# A model so small that a run is over in seconds.
SMALL = [
    "--config=configs/gritlm_tiny.py",
    "--config.model.sizes.hidden_size=32",
    "--config.model.sizes.intermediate_size=32",
    "--config.model.sizes.head_dim=8",
    "--config.data.embedding_batch_size=16",
    "--config.data.generative_batch_size=8",
    "--config.log_every_steps=1",
    "--config.optimizer.warmup_fraction=0.0",
]


def start_training(*arguments, devices=1):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "train.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_lines(workdir) if "loss" in line}


@pytest.mark.slow
def test_a_run_stopped_and_continued_has_the_losses_of_an_undisturbed_one(
    prepared_sample, tmp_path
):
    common = [*SMALL, f"--config.data.folder={prepared_sample}", "--config.steps=6"]
    common += ["--config.checkpoint.every_steps=2", "--config.evaluation.enabled=True"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finished = start_training(*common, f"--workdir={whole}")
    assert finished.returncode == 0, finished.stderr

    # The stop: everything after step 2 is lost, though metrics of later steps were written.
    finished = start_training(*common, f"--workdir={stopped}")
    assert finished.returncode == 0, finished.stderr
    for checkpoint in (stopped / "checkpoints").iterdir():
        if checkpoint.name != "4":
            subprocess.run(["rm", "-r", str(checkpoint)], check=True)
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss"')  # Cut off in the middle of a line.
    finished = start_training(*common, f"--workdir={stopped}")
    assert finished.returncode == 0, finished.stderr
    assert "continuing from step 4" in finished.stdout
    assert "step 5/6" in finished.stdout and "step 4/6" not in finished.stdout

    assert losses(whole).keys() == {1, 2, 3, 4, 5, 6}
    assert losses(stopped) == losses(whole)
    assert len(read_lines(stopped)) == len(read_lines(whole))

    # A third start finds the run finished and shows its results again.
    finished = start_training(*common, f"--workdir={stopped}")
    assert finished.returncode == 0, finished.stderr
    assert "nDCG@10" in finished.stdout and "step 6" in finished.stdout
    assert "compiling" not in finished.stdout


@pytest.mark.slow
def test_a_run_leaves_what_the_readme_promises(prepared_sample, tmp_path):
    finished = start_training(
        *SMALL,
        f"--config.data.folder={prepared_sample}",
        "--config.steps=3",
        "--config.optimizer.learning_rate=1e-2",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
        f"--workdir={tmp_path}",
        devices=4,
    )
    assert finished.returncode == 0, finished.stderr
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["optimizer"]["learning_rate"] == 1e-2
    assert config["mesh"] == {"slice": 1, "fsdp": 2, "tensor": 2, "expert": 1}

    lines = read_lines(tmp_path)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        total = line["embedding_loss"] + 0.1 * line["generative_loss"]
        np.testing.assert_allclose(line["loss"], total, rtol=1e-5)
        assert line["tokens_per_second"] > 0 and line["step_seconds"] > 0
    assert steps[0]["learning_rate"] == pytest.approx(1e-2)

    measured = [line for line in lines if "held_out/perplexity" in line]
    assert [line["step"] for line in measured] == [0, 3]
    assert measured[1]["held_out/perplexity"] < measured[0]["held_out/perplexity"]
    assert 0 <= measured[1]["held_out/wordnet_senses/ndcg_at_10"] <= 1
    for word in ("chance", "BM25", "perplexity", str(tmp_path / "curves.png")):
        assert word in finished.stdout
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 200
        assert len(picture.convert("L").getcolors(256)) > 10  # Something is drawn on it.
    assert (tmp_path / "checkpoints" / "3").is_dir()

    # Its newest checkpoint goes to Hugging Face, with the values that training left.
    script = "from grit_jax.cli import main; main()"
    exported = tmp_path / "exported"
    subprocess.run(
        [sys.executable, "-c", script, "convert", "to-hf", tmp_path, exported], cwd=ROOT, check=True
    )
    trained, written = open_model(tmp_path), open_model(exported)
    assert trained.folder == tmp_path / "checkpoints" / "3"
    for parameter in written.parameters:
        index = tuple(slice(0, size) for size in parameter.full_shape)
        np.testing.assert_array_equal(
            trained.read(parameter, index), written.read(parameter, index)
        )

    # A run that starts from there starts where this one ended.
    finished = start_training(
        *SMALL,
        f"--config.data.folder={prepared_sample}",
        f"--config.model.weights={exported}",
        "--config.steps=1",
        f"--workdir={tmp_path / 'second'}",
    )
    assert finished.returncode == 0, finished.stderr
    assert f"starting from {exported}" in finished.stdout
    np.testing.assert_allclose(
        read_lines(tmp_path / "second")[0]["held_out/perplexity"],
        measured[1]["held_out/perplexity"],
        rtol=1e-5,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config.optimizer.learning_rat=1"], "learning_rat"),
        (["--config.steps=many"], "steps"),
        (["--config.model.pooling=max"], "config.model.pooling='max'"),
        (["--config.model.sizes.num_attention_heads=3"], "num_attention_heads=3"),
        (["--config.mesh.fsdp=3"], "fsdp=3"),
        (["--config.data.folder=nowhere"], "nowhere/sample_embedding.json"),
        (["--config.data.query_row_length=16"], "config.data.query_row_length=16"),
        (["--config.data.embedding_batch_size=5000"], "fewer than a batch of 5000"),
        (["--config.model.sizes.vocab_size=1000"], "vocab_size=1000"),
        (["--config.model.attention_implementation=cudnn"], "does not serve the type float32"),
    ],
)
def test_a_mistake_gets_one_line_before_anything_is_compiled(
    prepared_sample, tmp_path, arguments, named
):
    workdir = tmp_path / "run"
    finished = start_training(
        *SMALL, f"--config.data.folder={prepared_sample}", f"--workdir={workdir}", *arguments
    )
    assert finished.returncode == 2
    assert len(finished.stderr.strip().splitlines()) == 1, finished.stderr
    assert named in finished.stderr
    assert "compiling" not in finished.stdout
    assert not workdir.exists()


def test_training_from_prepared_data_loads_no_tensorflow(prepared_sample, tmp_path):
    arguments = [
        *SMALL,
        f"--config.data.folder={prepared_sample}",
        "--config.steps=1",
        "--config.evaluation.enabled=False",
        f"--workdir={tmp_path / 'run'}",
    ]
    script = """
import sys
from grit_jax.cli import train
train(sys.argv[1:])
loaded = {name.split(".")[0] for name in sys.modules}
assert "jax" in loaded
unwanted = {"tensorflow", "seqio", "tensorflow_text", "tensorflow_datasets", "torch"}
assert not loaded & unwanted, loaded & unwanted
"""
    finished = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()
