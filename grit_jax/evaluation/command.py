"""The command `grit-jax evaluate`: MTEB and lm-eval scores of a model, next to the paper's."""

import argparse
from collections.abc import Iterable, Sequence
import inspect
import json
from pathlib import Path
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from grit_jax.conversion import open_model
from grit_jax.evaluation.paper import GENERATIVE, MTEB_BENCHMARK, NUM_FEWSHOT, QUICK_TASKS
from grit_jax.evaluation.paper_table import paper_tables
from grit_jax.evaluation.results import Results, model_settings
from grit_jax.inference.model_options import add_model_options, load_model
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.user_modules import import_named


def run(argv: Sequence[str]) -> None:
    """Evaluates a model with MTEB or lm-eval, or prints the paper's tables with its scores.

    Raises:
      InputError, ModuleError, ResultsError, ConversionError: an argument or a file is wrong.
      ImportError: a harness is not installed.
    """
    arguments = _parser().parse_args(argv)
    actions = {"mteb": _run_mteb, "lm-eval": _run_lm_eval, "table": _print_all_tables}
    actions[arguments.action](arguments)


def _run_mteb(arguments: argparse.Namespace) -> None:
    import mteb

    from grit_jax.evaluation.mteb_model import MtebModel

    tasks = _mteb_tasks(arguments)
    instructions = _read_instructions(arguments.instructions)
    results, fingerprint = _open_results(arguments)
    model: Any = MtebModel(
        load_model(arguments),
        Path(arguments.model).resolve(),
        fingerprint,
        max_length=arguments.max_length,
        instructions=instructions,
    )
    results.begin("mteb", model.settings)
    errors = []
    for task in tasks:
        evaluated = mteb.evaluate(
            model,
            task,
            encode_kwargs={"batch_size": arguments.batch_size},
            cache=mteb.ResultCache(arguments.output / "mteb"),
            raise_error=False,
        )
        errors += evaluated.exceptions or []
        scores = {result.task_name: float(result.get_score()) for result in evaluated.task_results}
        results.add("mteb", scores)
        for name, score in scores.items():
            print(f"{name}: {100 * score:.1f}", flush=True)
    _print_scored_tables(results)
    for error in errors:
        print(f"{error.task_name} failed: {' '.join(error.exception.split())}", file=sys.stderr)
    if errors:
        raise SystemExit(1)


def _mteb_tasks(arguments: argparse.Namespace) -> list[Any]:
    """Returns the tasks of the arguments, those of the user's modules first."""
    import mteb
    from mteb.abstasks import AbsTask

    own = {}
    for name in arguments.module:
        for _, found in inspect.getmembers(import_named(name), inspect.isclass):
            if issubclass(found, AbsTask) and found.__module__ == name:
                own[found.metadata.name] = found()
    if arguments.preset == "paper":
        return [*own.values(), *mteb.get_benchmark(MTEB_BENCHMARK).tasks]
    wanted = [*own, *QUICK_TASKS] if arguments.preset == "quick" else arguments.tasks or [*own]
    if not wanted:
        raise InputError("no tasks: use --tasks NAME ..., --preset paper, or --module MODULE")
    tasks = []
    for name in wanted:
        try:
            tasks.append(own[name] if name in own else mteb.get_task(name, arguments.languages))
        except KeyError as error:
            raise InputError(f"MTEB: {error.args[0]}") from None
    return tasks


def _read_instructions(path: Path | None) -> dict[str, str] | None:
    """Returns the instructions in a JSON file, by task."""
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"--instructions {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"--instructions {path} must hold a JSON object of instructions by task")
    return content


def _run_lm_eval(arguments: argparse.Namespace) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from grit_jax.evaluation.lm_eval_model import LmEvalModel

    folder = arguments.task_folder
    manager = TaskManager(include_path=None if folder is None else str(folder))
    wanted = arguments.tasks
    if arguments.preset == "paper":
        wanted = [task for row in GENERATIVE for task in row.tasks]
        arguments.apply_chat_template = True
    unknown = [name for name in wanted if not manager.match_tasks([name])]
    if unknown or not wanted:
        raise InputError(
            f"lm-eval has no task {', '.join(unknown)}: `lm-eval ls tasks` lists its tasks, and "
            "--task-folder adds a folder of your own"
            if unknown
            else "no tasks: use --tasks NAME ..., or --preset paper"
        )
    results, _ = _open_results(arguments)
    loaded = load_model(arguments)
    results.begin("lm_eval", model_settings(loaded))
    model = LmEvalModel(loaded, batch_size=arguments.batch_size)
    evaluate: Any = lm_eval.simple_evaluate  # Its decorator hides its parameters.
    for name in wanted:
        num_fewshot = arguments.num_fewshot
        if num_fewshot is None and arguments.preset == "paper":
            num_fewshot = NUM_FEWSHOT.get(name)
        evaluated: Any = evaluate(
            model,
            tasks=[name],
            num_fewshot=num_fewshot,
            limit=arguments.limit,
            apply_chat_template=arguments.apply_chat_template,
            task_manager=manager,
            log_samples=arguments.log_samples,
            confirm_run_unsafe_code=arguments.confirm_run_unsafe_code,
        )
        _save(arguments.output / "lm_eval", name, evaluated)
        # The tables do not show scores on a part of a task.
        suffix = "" if arguments.limit is None else f" (limit {arguments.limit})"
        scores = {f"{task}{suffix}": values for task, values in evaluated["results"].items()}
        results.add("lm_eval", scores)
        for task, values in scores.items():
            numbers = {key: value for key, value in values.items() if isinstance(value, float)}
            shown = ", ".join(f"{key} {value:.4f}" for key, value in numbers.items())
            print(f"{task}: {shown}", flush=True)
    _print_scored_tables(results)


def _open_results(arguments: argparse.Namespace) -> tuple[Results, str]:
    """Returns the folder of results and the fingerprint of the model's weights."""
    fingerprint = open_model(arguments.model, base=arguments.base).weights_fingerprint()
    return Results(arguments.output, fingerprint), fingerprint


def _save(folder: Path, name: str, evaluated: dict[str, Any]) -> None:
    """Writes lm-eval's full output for a task to a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.json"
    path.write_text(json.dumps(evaluated, indent=2, default=str) + "\n", encoding="utf-8")


def _print_all_tables(arguments: argparse.Namespace) -> None:
    results = None if arguments.output is None else Results(arguments.output)
    _print(paper_tables(results))


def _print_scored_tables(results: Results) -> None:
    """Prints the paper's rows for which there are scores."""
    _print(paper_tables(results, only_scored=True))


def _print(tables: Iterable[Table]) -> None:
    for table in tables:
        Console(width=120).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grit-jax evaluate")
    actions = parser.add_subparsers(dest="action", required=True)
    embedding = actions.add_parser("mteb", help="evaluate embeddings with MTEB")
    generation = actions.add_parser("lm-eval", help="evaluate generation with lm-eval")
    table = actions.add_parser("table", help="print the paper's tables and your model's scores")
    table.add_argument("--output", type=Path, help="folder of results to show (default: none)")
    presets = {
        embedding: {
            "choices": ("paper", "quick"),
            "help": "the paper's 56 tasks, or 9 of them",
        },
        generation: {"choices": ("paper",), "help": "the tasks closest to the paper's"},
    }
    for action, preset in presets.items():
        add_model_options(action)
        action.add_argument("--output", type=Path, required=True, help="folder for the results")
        tasks = action.add_mutually_exclusive_group()
        tasks.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="tasks to run")
        tasks.add_argument("--preset", **preset)
    embedding.add_argument(
        "--languages",
        nargs="+",
        default=["eng"],
        help="language codes of --tasks (eng)",
    )
    embedding.add_argument(
        "--module", action="append", default=[], help="Python module with MTEB tasks of your own"
    )
    embedding.add_argument(
        "--instructions", type=Path, help="JSON file of instructions by task, replacing MTEB's"
    )
    embedding.add_argument(
        "--max-length", type=int, default=512, help="maximum tokens per text (512)"
    )
    embedding.add_argument("--batch-size", type=int, default=256, help="texts per batch (256)")
    generation.add_argument("--task-folder", type=Path, help="folder with YAML tasks of your own")
    generation.add_argument(
        "--num-fewshot", type=int, help="examples before each question (default: the task's)"
    )
    generation.add_argument("--limit", type=int, help="use only the first documents of each task")
    generation.add_argument("--batch-size", type=int, default=32, help="prompts per batch (32)")
    generation.add_argument(
        "--apply-chat-template", action="store_true", help="format prompts as chats"
    )
    generation.add_argument("--log-samples", action="store_true", help="save every answer")
    generation.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="allow tasks to run code that the model wrote (HumanEval)",
    )
    return parser
