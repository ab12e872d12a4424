"""The paper's claim on a real model and public text: python -m experiments.claim FOLDER

Trains SmolLM2-135M-Instruct on pairs of texts, on chats, and on both at once, and measures each
model at retrieval and at generation on what it was not trained on. All that is done is kept in
FOLDER: the same command goes on where it was interrupted, and prints the tables at the end.
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
    """The experiment cannot go on; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what of the experiment is not done yet; returns 1, with a line, if it cannot be.

    It returns 130 if it is interrupted.
    """
    options = _parse(arguments)
    console = Console(highlight=False)
    # The device is for the processes that train and measure.
    jax.config.update("jax_platforms", "cpu")
    try:
        run_experiment(options, console)
    except (ConversionError, ExperimentError, ImportError, MissingModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return 0


def run_experiment(options: argparse.Namespace, console: Console) -> None:
    """Makes data and base model, trains and measures every run, and writes the report.

    Raises:
      OSError, ImportError: a baseline is not installed, or a file cannot be read or written.
      MissingModelError, ConversionError: the base model cannot be had, or not be read.
      ExperimentError: a command failed, the folder has another preset, or --data is not there.
    """
    folder, preset = options.folder.resolve(), PRESETS[options.preset]
    data = (options.data or folder / "data").resolve()
    if options.data and not data.is_dir():
        raise ExperimentError(f"no folder {data}: make it with python -m experiments.build_data")
    folder.mkdir(parents=True, exist_ok=True)
    _keep_preset(folder, options.preset)
    if not data.is_dir() and build_data.main([str(data)]):
        raise ExperimentError("the data could not be made: see above")
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
    """Returns the runs and their seeds: the main ones seed after seed, ablations with the first.

    Args:
      seeds: of the main runs.
      names: those of the main runs to make.
      ablations: whether to make these, too.
    """
    main_runs = [(run, seed) for seed in seeds for run in MAIN if run.name in names]
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
    """Writes down whose folder it is: what it has is not made again for another preset."""
    path = folder / "preset.txt"
    if not path.is_file():
        path.write_text(preset)
    elif path.read_text() != preset:
        raise ExperimentError(
            f"{folder} has the preset {path.read_text()}: name another folder for {preset}"
        )


def _prepare(data: Path, base: Path, prepared: Path, preset: Preset) -> None:
    whole = prepared / ".whole"
    if whole.is_file():
        return
    lengths = zip(("query", "passage", "chat"), preset.lengths, strict=True)
    command = ["prepare", f"claim={data}", "--output", prepared]
    command += ["--tokenizer", base / "tokenizer" / "tokenizer.json"]
    command += [f"--{name}-length={length}" for name, length in lengths]
    command += ["--max-rejected=0.7"]  # Of short forms, which have no room for long prompts.
    _call("grit_jax", command, prepared.with_suffix(".log"))
    whole.touch()


def _train(workdir: Path, fields: Mapping[str, Any]) -> None:
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    config = ROOT / "experiments" / "config.py"
    command = ["train", f"--config={config}", f"--workdir={workdir}", *overrides]
    _call("grit_jax", command, workdir / "train.log")


def _call(module: str, arguments: Sequence[Any], log: Path) -> None:
    """Runs a module in a process of its own, which gives its memory back; its words go to `log`.

    Raises:
      ExperimentError: it failed.
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
    parser = argparse.ArgumentParser(description="Repeat the paper's claim in small.")
    parser.add_argument("folder", type=Path, help="for all that is made, of one preset")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="size of all runs (cpu)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(0)")
    names = [run.name for run in MAIN]
    parser.add_argument("--runs", nargs="+", choices=names, default=names, help="(all of them)")
    parser.add_argument("--ablations", action="store_true", help="the paper's, with the first seed")
    parser.add_argument("--data", type=Path, help="made by experiments.build_data (made here)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
