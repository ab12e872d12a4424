"""The paper's claim on a real model and public text: python -m experiments.claim FOLDER

Trains SmolLM2-135M-Instruct on pairs of texts, on chats, and on both at once, and measures each
model at retrieval and at generation on what it was not trained on. All that is done is kept in
FOLDER: the same command goes on where it was interrupted, and prints the tables at the end.
"""

import argparse
from collections.abc import Mapping, Sequence
import os
from pathlib import Path
import shlex
import subprocess
import sys
import time
from typing import Any

import jax
from rich.console import Console

from experiments import build_data
from experiments.base_model import MissingModelError, make_base_model, versions
from experiments.baselines import find_minilm, measure_baselines
from experiments.gritlm import Measured
from experiments.measure import (
    Measures,
    by_embeddings,
    measure_choices,
    measure_perplexity,
    measure_reasoning,
    measure_retrieval,
)
from experiments.presets import ABLATIONS, MAIN, PRESETS, UNTRAINED, Preset, Run
from experiments.report import write_report
from experiments.smaller import write_smaller
from grit_jax import GritLM
from grit_jax.conversion.companion_files import write_json

ROOT = Path(__file__).parents[1]
BASELINES = "baselines.json"


class StageError(Exception):
    """A command of the experiment failed; the message has it, and its last lines."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what of the experiment is not done yet; returns 1, with a line, if it cannot be."""
    options = _parse(arguments)
    console = Console(highlight=False)
    try:
        run_experiment(options, console)
    except (FileNotFoundError, ImportError, MissingModelError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_experiment(options: argparse.Namespace, console: Console) -> None:
    """Makes data and base model, trains and measures every run, and writes the report.

    Raises:
      FileNotFoundError, ImportError: a baseline is not installed.
      MissingModelError: the base model cannot be had.
      StageError: a command failed.
    """
    folder, preset = options.folder.resolve(), PRESETS[options.preset]
    data = options.data or folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    if not data.is_dir() and build_data.main([str(data)]):
        raise StageError("the data could not be made: see above")
    measured_on = data
    if preset.most_measured is not None:
        measured_on = folder / "measured_on"
        if not measured_on.is_dir():
            write_smaller(data, measured_on, preset.most_measured)
    if not (folder / BASELINES).is_file():
        console.print("baselines")
        write_json(folder / BASELINES, measure_baselines(measured_on, find_minilm()))
    base = folder / "base"
    origin = make_base_model(base, preset.layers, folder / "downloads")
    _prepare(data, base, folder / "prepared", preset)
    for run, seed in planned(options.seeds, ablations=options.ablations):
        _train_and_measure(run, seed, folder, preset, measured_on, console)
    about = {
        "preset": preset.title,
        "base": origin,
        "command": f"python -m experiments.claim {shlex.join(sys.argv[1:])}",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": versions(),
    }
    write_report(folder, about, console)


def planned(seeds: Sequence[int], *, ablations: bool) -> list[tuple[Run, int]]:
    """Returns the runs and their seeds: the main ones seed after seed, ablations with the first."""
    main_runs = [(run, seed) for seed in seeds for run in MAIN]
    others = [(run, seeds[0]) for run in ABLATIONS] if ablations else []
    return [(UNTRAINED, 0), *main_runs, *others]


def run_folder(folder: Path, run: Run, seed: int) -> Path:
    """Returns where a run lies."""
    return folder / "runs" / f"{run.name.replace(', ', '_').replace(' ', '_')}_{seed}"


def _train_and_measure(
    run: Run, seed: int, folder: Path, preset: Preset, measured_on: Path, console: Console
) -> None:
    own = run_folder(folder, run, seed)
    if (own / "measures.json").is_file():
        return
    start = time.monotonic()
    path = folder / "base"
    if run.overrides is not None:
        fields = {
            "seed": seed,
            "model.weights": folder / "base",
            "data.folder": folder / "prepared",
            **preset.overrides,
            **run.overrides,
        }
        own.mkdir(parents=True, exist_ok=True)
        _train(own, fields)
        path = own
    trained = time.monotonic()
    model = GritLM.from_pretrained(path, dtype="float32")
    measures = measure_model(model, measured_on, max(preset.lengths))
    own.mkdir(parents=True, exist_ok=True)
    content = {
        "run": run.name,
        "seed": seed,
        "measures": measures,
        "seconds_trained": round(trained - start),
        "seconds_measured": round(time.monotonic() - trained),
    }
    write_json(own / "measures.json", content)
    took = f"{content['seconds_trained']} s + {content['seconds_measured']} s"
    console.print(f"{run.name}, seed {seed}: {took}")


def measure_model(model: GritLM, folder: Path, max_length: int) -> Measures:
    """Returns all measures of a model on the held-out data in a folder."""
    measured = Measured(model, max_length=max_length)
    return {
        **measure_retrieval(by_embeddings(measured.encode), folder),
        **measure_choices(measured.likelihoods, folder),
        **measure_reasoning(measured.generate, folder),
        **measure_perplexity(measured.likelihoods, folder),
    }


def _prepare(data: Path, base: Path, prepared: Path, preset: Preset) -> None:
    whole = prepared / ".whole"
    if whole.is_file():
        return
    lengths = zip(("query", "passage", "chat"), preset.lengths, strict=True)
    command = ["prepare", f"claim={data}", "--output", prepared]
    command += ["--tokenizer", base / "tokenizer" / "tokenizer.json"]
    command += [f"--{name}-length={length}" for name, length in lengths]
    command += ["--max-rejected=0.7"]  # Of short forms, which have no room for long prompts.
    _call("from grit_jax.cli import main; main()", command, prepared.with_suffix(".log"))
    whole.touch()


def _train(workdir: Path, fields: Mapping[str, Any]) -> None:
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    command = [f"--config={ROOT / 'experiments' / 'config.py'}", f"--workdir={workdir}", *overrides]
    _call("from grit_jax.cli import train; train()", command, workdir / "train.log")


def _call(script: str, arguments: Sequence[Any], log: Path) -> None:
    """Runs a command in a process of its own, which gives its memory back; its words go to `log`.

    Raises:
      StageError: it failed.
    """
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    with log.open("ab") as file:
        finished = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, check=False
        )
    if finished.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise StageError(f"{shlex.join(command[3:])} failed, see {log}:\n{last}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Repeat the paper's claim in small.")
    parser.add_argument("folder", type=Path, help="for all that is made")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="size of all runs (cpu)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--ablations", action="store_true", help="the paper's, with the first seed")
    parser.add_argument("--data", type=Path, help="made by experiments.build_data (made here)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
