"""grit-jax evaluate: a model measured by MTEB and by lm-eval, beside the paper's table."""

import argparse
from collections.abc import Sequence
import inspect
import json
from pathlib import Path
import sys
import time
from typing import Any

from rich.console import Console

from grit_jax.conversion import open_model
from grit_jax.evaluation.paper import GENERATIVE, MTEB_BENCHMARK, NUM_FEWSHOT, QUICK_TASKS
from grit_jax.evaluation.paper_table import paper_tables
from grit_jax.evaluation.results import Results, settings_of
from grit_jax.inference.model_options import add_model_options, load_model
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.user_modules import import_named


def run(argv: Sequence[str]) -> None:
    """Measures a model by MTEB or lm-eval, or prints the paper's table with its column

    Raises:
      InputError, ModuleError, ResultsError, ConversionError: the message names what is wrong.
      ImportError: a harness is not installed.
    """
    arguments = _parser().parse_args(argv)
    {"mteb": _run_mteb, "lm-eval": _run_lm_eval, "table": _show}[arguments.action](arguments)


def _run_mteb(arguments: argparse.Namespace) -> None:
    import mteb

    from grit_jax.evaluation.mteb_model import MtebModel

    tasks = _mteb_tasks(arguments)
    instructions = _read_instructions(arguments.instructions)
    results, revision = _results(arguments)
    model: Any = MtebModel(
        load_model(arguments),
        Path(arguments.model).resolve(),
        revision,
        max_length=arguments.max_length,
        instructions=instructions,
    )
    results.measure_with("mteb", model.settings)
    failed = []
    for task in tasks:
        measured = mteb.evaluate(
            model,
            task,
            encode_kwargs={"batch_size": arguments.batch_size},
            cache=mteb.ResultCache(arguments.output / "mteb"),
            raise_error=False,
        )
        failed += measured.exceptions or []
        scores = {one.task_name: float(one.get_score()) for one in measured.task_results}
        results.add("mteb", scores)
        for name, score in scores.items():
            print(f"{name}: {100 * score:.1f}", flush=True)
    _show(arguments)
    for error in failed:
        print(f"{error.task_name} failed: {' '.join(error.exception.split())}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def _mteb_tasks(arguments: argparse.Namespace) -> list[Any]:
    """Returns the tasks that were asked for, one's own first."""
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
        raise InputError("say which tasks: --tasks NAME ..., --preset paper, or --module of yours")
    tasks = []
    for name in wanted:
        try:
            tasks.append(own[name] if name in own else mteb.get_task(name, arguments.languages))
        except KeyError as error:
            raise InputError(f"MTEB: {error.args[0]}") from None
    return tasks


def _read_instructions(path: Path | None) -> dict[str, str] | None:
    """Returns the content of a file of instructions, None if there is none."""
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"--instructions {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"--instructions {path} does not hold an object of instructions by task")
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
            f"lm-eval has no task {', '.join(unknown)}: `lm-eval ls tasks` lists them, and "
            "--task-folder says where yours are"
            if unknown
            else "say which tasks: --tasks NAME ..., or --preset paper"
        )
    results, _ = _results(arguments)
    loaded = load_model(arguments)
    results.measure_with("lm_eval", settings_of(loaded))
    model = LmEvalModel(loaded, batch_size=arguments.batch_size)
    evaluate: Any = lm_eval.simple_evaluate  # Its decorator hides its parameters.
    for name in wanted:
        num_fewshot = arguments.num_fewshot
        if num_fewshot is None and arguments.preset == "paper":
            num_fewshot = NUM_FEWSHOT.get(name)
        measured: Any = evaluate(
            model,
            tasks=[name],
            num_fewshot=num_fewshot,
            limit=arguments.limit,
            apply_chat_template=arguments.apply_chat_template,
            task_manager=manager,
            log_samples=arguments.log_samples,
            confirm_run_unsafe_code=arguments.confirm_run_unsafe_code,
        )
        _keep(arguments.output / "lm_eval", name, measured)
        # A part of a task is another measure, and no number for the table.
        part = "" if arguments.limit is None else f" (limit {arguments.limit})"
        scores = {f"{task}{part}": values for task, values in measured["results"].items()}
        results.add("lm_eval", scores)
        for task, values in scores.items():
            numbers = {key: value for key, value in values.items() if isinstance(value, float)}
            shown = ", ".join(f"{key} {value:.4f}" for key, value in numbers.items())
            print(f"{task}: {shown}", flush=True)
    _show(arguments)


def _results(arguments: argparse.Namespace) -> tuple[Results, str]:
    """Returns the folder of results, and what tells the model's weights from others'."""
    revision = open_model(arguments.model, base=arguments.base).weights_fingerprint()
    return Results(arguments.output, revision), revision


def _keep(folder: Path, name: str, measured: dict[str, Any]) -> None:
    """Writes all that lm-eval says of a task to a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.json"
    path.write_text(json.dumps(measured, indent=2, default=str) + "\n", encoding="utf-8")


def _show(arguments: argparse.Namespace) -> None:
    results = None if arguments.output is None else Results(arguments.output)
    for table in paper_tables(results):
        Console(width=120).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grit-jax evaluate")
    actions = parser.add_subparsers(dest="action", required=True)
    embedding = actions.add_parser("mteb", help="embeddings, by MTEB's tasks")
    generation = actions.add_parser("lm-eval", help="generation, by lm-eval's tasks")
    table = actions.add_parser("table", help="print the paper's table, with one's own column")
    table.add_argument("--output", type=Path, help="results to show (none)")
    presets = {
        embedding: {"choices": ("paper", "quick"), "help": "the paper's 56 tasks, or 9 small ones"},
        generation: {"choices": ("paper",), "help": "the tasks nearest the paper's"},
    }
    for each, preset in presets.items():
        add_model_options(each)
        each.add_argument("--output", type=Path, required=True, help="folder for the results")
        which = each.add_mutually_exclusive_group()
        which.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="of the harness")
        which.add_argument("--preset", **preset)
    embedding.add_argument(
        "--languages", nargs="+", default=["eng"], help="of --tasks, as MTEB codes them (eng)"
    )
    embedding.add_argument(
        "--module", action="append", default=[], help="Python module that declares tasks of yours"
    )
    embedding.add_argument(
        "--instructions", type=Path, help="JSON file of instructions by task, for MTEB's own"
    )
    embedding.add_argument("--max-length", type=int, default=512, help="tokens of a text (512)")
    embedding.add_argument("--batch-size", type=int, default=256, help="bounds memory (256)")
    generation.add_argument("--task-folder", type=Path, help="folder of YAML tasks of yours")
    generation.add_argument("--num-fewshot", type=int, help="examples (as the task has it)")
    generation.add_argument("--limit", type=int, help="take so many of a task's documents")
    generation.add_argument("--batch-size", type=int, default=32, help="prompts at once (32)")
    generation.add_argument(
        "--apply-chat-template", action="store_true", help="put prompts in GRIT's chat format"
    )
    generation.add_argument("--log-samples", action="store_true", help="keep every answer")
    generation.add_argument(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="let tasks run the code that the model writes (HumanEval)",
    )
    return parser
