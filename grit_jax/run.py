"""From a configuration to a finished run: state, loop, and the table at the end."""

from collections.abc import Callable
import json

from etils import epath
import jax
from rich.console import Console

from grit_jax.config import Config, check_fields
from grit_jax.conversion import Model
from grit_jax.data.batches import Batches, read_ahead
from grit_jax.evaluation.held_out import HeldOut
from grit_jax.evaluation.table import result_table
from grit_jax.from_config import (
    check_attention,
    make_batches,
    make_checkpoints,
    make_held_out,
    make_schedule,
    make_trainer,
    open_pretrained,
)
from grit_jax.models import MistralConfig
from grit_jax.training.checkpoints import Checkpoints
from grit_jax.training.flops import peak_flops
from grit_jax.training.loop import SkippedSteps, StepReport, Stopwatch, train
from grit_jax.training.metrics import MetricsFile, draw_curves, read_metrics
from grit_jax.training.preemption import Preempted, Preemption
from grit_jax.training.progress import ProgressReport
from grit_jax.training.train_step import Trainer, TrainState


def run(config: Config, workdir: epath.Path) -> None:
    """Trains as the configuration says, from the newest checkpoint in `workdir` if there is one.

    All that can be wrong with the configuration or the data shows before anything is compiled.
    The working directory ends up with `config.json`, `metrics.jsonl`, `curves.png` and
    `checkpoints/`.

    Raises:
      ConfigError, MeshError, PreparedDataError, CheckpointError: the message names what is wrong.
      NotFiniteError: too many steps in a row had a gradient that is not finite.
      Preempted: the machine is to go, and the state is saved.
    """
    console = Console()
    check_fields(config.to_dict())
    pretrained = open_pretrained(config)
    trainer = make_trainer(config, pretrained)
    batches = make_batches(config, trainer)
    check_attention(trainer, batches)
    held_out = make_held_out(config, trainer)
    workdir.mkdir(parents=True, exist_ok=True)
    _keep_config(config, trainer.model_config, workdir / "config.json")

    with make_checkpoints(config, trainer, batches, workdir / "checkpoints") as saved:
        state = _first_state(config, trainer, pretrained, saved, console)
        start = int(state.step)
        metrics_file = MetricsFile(workdir / "metrics.jsonl", from_step=start)
        if held_out is not None and not metrics_file.has_held_out:
            _measure(held_out, state, metrics_file, console.print)
        if start < config.steps:
            _train(config, trainer, state, batches, saved, metrics_file, held_out, console)
    lines = read_metrics(metrics_file.path)
    draw_curves(lines, workdir / "curves.png")
    if held_out is not None:
        console.print(result_table(held_out, lines))
    for name in ("checkpoints", "metrics.jsonl", "curves.png"):
        console.print(f"{name:15} {workdir / name}", highlight=False, soft_wrap=True)


def _keep_config(config: Config, model: MistralConfig, path: epath.Path) -> None:
    resolved = config.to_dict()
    sizes = resolved["model"]["sizes"]
    resolved["model"]["sizes"] = {name: getattr(model, name) for name in sizes}
    path.write_text(json.dumps(resolved, indent=1) + "\n")


def _first_state(
    config: Config,
    trainer: Trainer,
    pretrained: Model | None,
    saved: Checkpoints,
    console: Console,
) -> TrainState:
    restored = saved.restore(trainer.abstract_state())
    if restored is not None:
        console.print(f"continuing from step {restored.step} of {saved.folder}", highlight=False)
        return restored
    if pretrained is not None:
        console.print(f"starting from {pretrained.folder}", highlight=False, soft_wrap=True)
        return trainer.state_from(pretrained.load, config.seed)
    count = sum(leaf.size for leaf in jax.tree.leaves(trainer.abstract_state().parameters))
    console.print(f"{count:,} parameters, at random", highlight=False)
    return trainer.initial_state(config.seed)


def _train(
    config: Config,
    trainer: Trainer,
    state: TrainState,
    batches: Batches,
    saved: Checkpoints,
    metrics_file: MetricsFile,
    held_out: HeldOut | None,
    console: Console,
) -> None:
    start = int(state.step)
    with ProgressReport(start, config.steps, console) as progress, Preemption() as preemption:

        def measure_and_save(report: StepReport) -> None:
            is_last, measures = report.step == config.steps, None
            every = config.evaluation.every_steps
            if held_out is not None and (is_last or (every and report.step % every == 0)):
                measures = _measure(held_out, report.state, metrics_file, progress.say)
            is_preempted = preemption.is_due(report.step)
            if is_last or is_preempted or saved.is_due(report.step):
                seconds = saved.save(report.step, report.state, measures)
                metrics_file.write(report.step, {"checkpoint_seconds": seconds})
            if is_preempted and not is_last:
                raise Preempted(f"the machine is to go: saved after step {report.step}")

        receivers = [metrics_file.write, progress.show]
        hooks = [
            Stopwatch(
                config.log_every_steps,
                config.steps,
                make_schedule(config),
                receivers,
                peak_flops(list(trainer.mesh.devices.flat)),
            ),
            SkippedSteps(config.optimizer.most_skipped_in_a_row),
            measure_and_save,
        ]
        coming = read_ahead(batches, start, config.steps, config.data.reading_threads)
        train(trainer, state, coming, hooks, progress.say)


def _measure(
    held_out: HeldOut,
    state: TrainState,
    metrics_file: MetricsFile,
    say: Callable[[str], None],
) -> dict[str, float]:
    say("measuring on held-out data ...")
    measures = held_out.measure(state.parameters)
    prefixed = {f"held_out/{name}": value for name, value in measures.items()}
    metrics_file.write(int(state.step), prefixed)
    return measures
