"""Complete runs of train.py in real processes, with real files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

from command_line import ROOT, assert_fails_in_one_line, grit_jax_in_process, run_python
from etils import epath
import numpy as np
from PIL import Image
import pytest
from small_run import SMALL

from grit_jax.config_flags import parse_flags
from grit_jax.conversion import open_model
from grit_jax.conversion.stored_tokenizer import find_end_tokens, find_tokenizer
from grit_jax.files import locked
from grit_jax.from_config import SAMPLE_TEXT
from grit_jax.objectives.embedding import EmbeddingSpec
import grit_jax.run
from grit_jax.run import run
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.training.checkpoints import CheckpointError, RestartRequired
from grit_jax.training.hooks.stop_signals import INTERRUPTED


def start_training(*arguments, devices=1, **variables):
    process = start_in_background(*arguments, devices=devices, **variables)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start_in_background(*arguments, devices=1, **variables):
    environment = os.environ | variables
    environment |= {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process, workdir, step):
    """Waits until a run has written the metrics of a step."""
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_lines(workdir) if "loss" in line}


@pytest.mark.slow
def test_a_run_stopped_and_continued_has_the_losses_of_an_undisturbed_one(
    prepared_sample, tmp_path
):
    common = [*SMALL, f"--config.data.folder={prepared_sample}", "--config.steps=30"]
    common += ["--config.checkpoint.every_steps=5", "--config.checkpoint.keep_every_steps=10"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finished = start_training(*common, f"--workdir={whole}")
    assert finished.returncode == 0, finished.stderr
    assert losses(whole).keys() == set(range(1, 31))

    process = start_in_background(*common, f"--workdir={stopped}")
    wait_for_step(process, stopped, 7)
    process.send_signal(signal.SIGINT)  # As Ctrl-C does. SIGTERM is sent in test_bucket_run.py.
    _, stderr = process.communicate()
    assert process.returncode == INTERRUPTED, stderr
    assert "saved after step" in stderr and "the same command continues" in stderr
    saved = max(int(path.name) for path in (stopped / "checkpoints").iterdir())
    assert saved == read_lines(stopped)[-1]["step"] >= 7
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {saved + 1}, "loss": 0.5}}\n')  # Of steps that are lost.
        file.write(f'{{"step": {saved + 2}, "loss"')  # Cut off in the middle of a line.
    finished = start_training(*common, f"--workdir={stopped}")
    assert finished.returncode == 0, finished.stderr
    assert f"continuing from step {saved}" in finished.stdout
    assert f"step {saved + 1}/30" in finished.stdout and f"step {saved}/30" not in finished.stdout
    assert losses(stopped) == losses(whole)
    held_out = [
        [line for line in read_lines(run) if "held_out/perplexity" in line]
        for run in (whole, stopped)
    ]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 2
    kept = {int(path.name) for path in (stopped / "checkpoints").iterdir()}
    assert kept >= {10, 20, 25, 30}

    # A third start finds the run finished and shows its results again, and what has changed.
    finished = start_training(
        *common, f"--workdir={stopped}", "--config.optimizer.learning_rate=0.25"
    )
    assert finished.returncode == 0, finished.stderr
    assert "config.optimizer.learning_rate: 0.0005 -> 0.25\n" in finished.stdout
    assert "nDCG@10" in finished.stdout and "step 30" in finished.stdout
    assert "this run is finished, with 30 steps: to train further, raise config.steps" in (
        finished.stdout
    )
    assert "compiling" not in finished.stdout

    # Another run does not go on from these.
    other = start_training(*common, f"--workdir={stopped}", "--config.data.group_size=3")
    assert other.returncode == 2
    assert "config.data.group_size was 2 and is 3" in other.stderr
    assert len(other.stderr.strip().splitlines()) == 1
    assert json.loads((stopped / "config.json").read_text())["data"]["group_size"] == 2


@pytest.mark.slow
def test_a_run_leaves_what_the_readme_promises(prepared_sample, tmp_path):
    finished = start_training(
        *SMALL,
        f"--config.data.folder={prepared_sample}",
        "--config.steps=3",
        "--config.optimizer.learning_rate=1e-2",
        "--config.model.attention=cccc",
        "--config.model.pooling=lasttoken",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
        "--config.profile.first_step=2",
        "--config.profile.num_steps=1",
        f"--workdir={tmp_path}",
        devices=4,
        JAX_COMPILATION_CACHE_DIR="",  # So that the run keeps its programs itself.
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
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 10_000
    assert list((tmp_path / "tensorboard").iterdir())
    assert any(path.name.startswith("jit__step") for path in (tmp_path / "compiled").iterdir())
    assert 0 < steps[-1]["goodput"] < 1

    # Its newest checkpoint goes to Hugging Face, with the values that training left.
    exported = tmp_path / "exported"
    finished = grit_jax_in_process("convert", "to-hf", tmp_path, exported, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    trained, written = open_model(tmp_path), open_model(exported)
    assert trained.folder == tmp_path / "checkpoints" / "3"
    for parameter in written.parameters:
        index = tuple(slice(0, size) for size in parameter.full_shape)
        np.testing.assert_array_equal(
            trained.read(parameter, index), written.read(parameter, index)
        )

    # They say how the model embeds, and have the tokenizer of its data; a copied checkpoint too.
    shutil.copytree(trained.folder, tmp_path / "copied")
    tokenizer = Tokenizer()
    for model in (open_model(tmp_path / "copied"), written):
        assert EmbeddingSpec.from_fields(model.fields) == EmbeddingSpec(
            attention="cccc", pooling="lasttoken"
        )
        # An export also has a tokenizer.json, which is read first.
        assert find_tokenizer(model, None).encode(SAMPLE_TEXT) == tokenizer.encode(SAMPLE_TEXT)
        assert find_end_tokens(model) == [tokenizer.eos_id]
    pooling = json.loads((exported / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_lasttoken"] and not pooling["pooling_mode_mean_tokens"]

    # A run that starts from there starts where this one ended, also with a scaling by 1.
    fields = json.loads((exported / "config.json").read_text())
    fields["rope_parameters"] |= {"rope_type": "linear", "factor": 1.0}
    (exported / "config.json").write_text(json.dumps(fields))
    finished = start_training(
        *SMALL,
        f"--config.data.folder={prepared_sample}",
        f"--config.model.weights={exported}",
        "--config.steps=1",
        f"--workdir={tmp_path / 'second'}",
    )
    assert finished.returncode == 0, finished.stderr
    assert f"starting from {exported}" in finished.stdout
    sizes = json.loads((tmp_path / "second" / "config.json").read_text())["model"]["sizes"]
    assert sizes["rope_scaling"]["factor"] == 1.0
    assert "passes over each dataset in 1 steps: " in finished.stdout
    np.testing.assert_allclose(
        read_lines(tmp_path / "second")[0]["held_out/perplexity"],
        measured[1]["held_out/perplexity"],
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config.optimizer.learning_rat=1"], "learning_rat"),
        (
            ["--config.data.generative_batch_size=5000"],
            "add examples, or lower config.data.generative_batch_size",
        ),
    ],
)
def test_a_mistake_gets_one_line_before_anything_is_compiled(
    prepared_sample, tmp_path, arguments, named
):
    folders = [f"--config.data.folder={prepared_sample}", f"--workdir={tmp_path / 'run'}"]
    finished = grit_jax_in_process("train", *SMALL, *folders, *arguments, cwd=ROOT)
    assert_fails_in_one_line(finished, named)
    assert len(finished.stderr.splitlines()) == 1, finished.stderr
    assert "compiling" not in finished.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_while_the_last_checkpoint_is_written_loses_nothing(prepared_sample, tmp_path):
    """And training from prepared data loads no TensorFlow."""
    workdir = tmp_path / "[run]"
    arguments = [
        *SMALL,
        f"--config.data.folder={prepared_sample}",
        "--config.steps=1",
        "--config.evaluation.enabled=False",
        f"--workdir={workdir}",
    ]
    script = """
import os, signal, sys
from grit_jax.cli import train
from grit_jax.training.checkpoints import Checkpoints
close = Checkpoints.__exit__
def tell_and_close(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    close(*arguments)
Checkpoints.__exit__ = tell_and_close
train(sys.argv[1:])
loaded = {name.split(".")[0] for name in sys.modules}
unwanted = {"tensorflow", "seqio", "tensorflow_text", "tensorflow_datasets"}
assert not loaded & unwanted, loaded & unwanted
"""
    finished = run_python(script, *arguments, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert (workdir / "checkpoints" / "1").is_dir()
    assert str(workdir / "checkpoints") in finished.stdout


def test_a_folder_that_another_run_has_or_that_cannot_be_made_is_named(
    prepared_sample, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    flags = [f"--config.data.folder={prepared_sample}", "--config.evaluation.enabled=False"]
    config, _ = parse_flags([*SMALL, *flags])
    with (
        locked(tmp_path),
        pytest.raises(RestartRequired, match=f"{tmp_path}: another run uses this folder"),
    ):
        run(config, epath.Path(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    workdir = epath.Path(tmp_path / ".lock" / "run")
    with pytest.raises(CheckpointError, match=f"{workdir} cannot be written to"):
        run(config, workdir)


def test_an_interrupt_before_the_first_step_says_how_to_go_on_in_one_line(monkeypatch):
    codes = []
    monkeypatch.setattr(grit_jax.run, "run", lambda *_: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(os, "_exit", codes.append)
    finished = grit_jax_in_process("train", *SMALL, cwd=ROOT)
    assert codes == [130]
    assert finished.stderr == "interrupted; the same command continues from the newest checkpoint\n"
