"""Tests the paper's claim on a real model and public text: python -m experiments.claim FOLDER

Trains SmolLM2-135M-Instruct on text pairs, on chats, and on both, and evaluates each model's
retrieval and generation on held-out data. Results are kept in FOLDER: the same command resumes an
interrupted experiment, and prints the tables at the end.
"""

import argparse
from collections.abc import Collection, Mapping, Sequence
import json
import os
from pathlib import Path
import shlex
import signal
import subprocess
import sys
import time
from typing import Any

import jax
from rich.console import Console

from experiments import build_data
from experiments.base_model import MissingModelError, make_base_model, versions
from experiments.baselines import find_minilm, measure_baselines
from experiments.presets import ABLATIONS, MAIN, PRESETS, UNTRAINED, Preset, Run
from experiments.report import write_report
from experiments.smaller import write_smaller
from grit_jax.cli import INTERRUPTED
from grit_jax.conversion import ConversionError
from grit_jax.files import write_json

ROOT = Path(__file__).parents[1]
BASELINES = "baselines.json"


class ExperimentError(Exception):
    """The experiment cannot continue; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the rest of the experiment; returns 1 after an error, 130 if interrupted."""
    options = _parse(arguments)
    console = Console(highlight=False)
    # Leave the accelerator to the processes that train and evaluate.
    jax.config.update("jax_platforms", "cpu")
    try:
        run_experiment(options, console)
    except (ConversionError, ExperimentError, ImportError, MissingModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command to resume", file=sys.stderr)
        return INTERRUPTED
    return 0


def run_experiment(options: argparse.Namespace, console: Console) -> None:
    """Builds data and base model, trains and evaluates every run, and writes the report.

    Raises:
      OSError, ImportError: a baseline is not installed, or a file cannot be read or written.
      MissingModelError, ConversionError: the base model is not available or cannot be read.
      ExperimentError: a command failed, the folder has another preset, or --data does not exist.
    """
    folder, preset = options.folder.resolve(), PRESETS[options.preset]
    data = (options.data or folder / "data").resolve()
    if options.data and not data.is_dir():
        raise ExperimentError(f"no folder {data}: build it with python -m experiments.build_data")
    folder.mkdir(parents=True, exist_ok=True)
    _keep_preset(folder, options.preset)
    if not data.is_dir() and build_data.main([str(data)]):
        raise ExperimentError("the data could not be built: see above")
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
    for run, seed in planned(options.seeds, options.runs, ablations=options.ablations):
        _train_and_measure(run, seed, folder, preset, measured_on, console)
    about = {
        "preset": preset.title,
        "base": origin,
        "command": f"python -m experiments.claim {shlex.join(sys.argv[1:])}",
        "versions": versions(),
    }
    write_report(folder, about, console)


def planned(
    seeds: Sequence[int], names: Collection[str], *, ablations: bool
) -> list[tuple[Run, int]]:
    """Returns runs with their seeds: main runs for each seed, ablations for the first seed.

    Args:
      seeds: seeds of the main runs.
      names: names of the main runs to include.
      ablations: whether to include the ablations.
    """
    main_runs = [(run, seed) for seed in seeds for run in MAIN if run.name in names]
    others = [(run, seeds[0]) for run in ABLATIONS] if ablations else []
    return [(UNTRAINED, 0), *main_runs, *others]


def run_folder(folder: Path, run: Run, seed: int) -> Path:
    """Returns the folder of a run."""
    return folder / "runs" / f"{run.name.replace(', ', '_').replace(' ', '_')}_{seed}"


def _train_and_measure(
    run: Run, seed: int, folder: Path, preset: Preset, measured_on: Path, console: Console
) -> None:
    own = run_folder(folder, run, seed)
    if (own / "measures.json").is_file():
        return
    own.mkdir(parents=True, exist_ok=True)
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
        _train(own, fields)
        path = own
    trained = time.monotonic()
    measured = own / "measured.json"
    command = [path, measured_on, f"--max-length={max(preset.lengths)}", f"--output={measured}"]
    _call("experiments.measure_model", command, own / "measure.log")
    content = {
        "run": run.name,
        "seed": seed,
        **json.loads(measured.read_text()),
        "seconds_trained": round(trained - start),
        "seconds_measured": round(time.monotonic() - trained),
    }
    write_json(own / "measures.json", content)
    measured.unlink()
    took = f"{content['seconds_trained']} s + {content['seconds_measured']} s"
    console.print(f"{run.name}, seed {seed}: {took}")


def _keep_preset(folder: Path, preset: str) -> None:
    """Records the preset of the folder, so that results of two presets never mix."""
    path = folder / "preset.txt"
    if not path.is_file():
        path.write_text(preset)
    elif path.read_text() != preset:
        raise ExperimentError(
            f"{folder} has the preset {path.read_text()}: use another folder for {preset}"
        )


def _prepare(data: Path, base: Path, prepared: Path, preset: Preset) -> None:
    whole = prepared / ".whole"
    if whole.is_file():
        return
    lengths = zip(("query", "passage", "chat"), preset.lengths, strict=True)
    command = ["prepare", f"claim={data}", "--output", prepared]
    command += ["--tokenizer", base / "tokenizer" / "tokenizer.json"]
    command += [f"--{name}-length={length}" for name, length in lengths]
    command += ["--max-rejected=0.7"]  # Short lengths reject long prompts.
    _call("grit_jax", command, prepared.with_suffix(".log"))
    whole.touch()


def _train(workdir: Path, fields: Mapping[str, Any]) -> None:
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    config = ROOT / "experiments" / "config.py"
    command = ["train", f"--config={config}", f"--workdir={workdir}", *overrides]
    _call("grit_jax", command, workdir / "train.log")


def _call(module: str, arguments: Sequence[Any], log: Path) -> None:
    """Runs a module in a subprocess, which frees its memory, with output appended to `log`.

    Raises:
      ExperimentError: the process failed.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    with log.open("ab") as file:
        finished = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, check=False
        )
    if finished.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        code = finished.returncode
        end = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        raise ExperimentError(f"{shlex.join(command[2:])} failed ({end}), see {log}:\n{last}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Test the paper's claim on a small model.")
    parser.add_argument("folder", type=Path, help="folder for all results of one preset")
    parser.add_argument(
        "--preset", choices=PRESETS, default="cpu", help="size of the runs (default: cpu)"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    names = [run.name for run in MAIN]
    parser.add_argument("--runs", nargs="+", choices=names, default=names, help="(default: all)")
    parser.add_argument(
        "--ablations",
        action="store_true",
        help="also run the paper's ablations, with the first seed",
    )
    parser.add_argument(
        "--data", type=Path, help="output of experiments.build_data (default: build)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
