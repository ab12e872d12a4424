"""A training run: makes its parts from the configuration, trains, and shows the results."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import errno
import json
from typing import Any

from etils import epath
import jax
from rich.console import Console

from grit_jax.bucket import check_writing, in_bucket, one_line
from grit_jax.compilation_cache import compilation_cache
from grit_jax.config import Config, changed_fields
from grit_jax.config_from_data import check_prepared, complete_config
from grit_jax.consistency import check_agreement, check_shared
from grit_jax.conversion import StoredModel
from grit_jax.data.batches import Batches, read_ahead
from grit_jax.evaluation.held_out import HeldOut
from grit_jax.evaluation.held_out_table import held_out_table
from grit_jax.files import locked, write_json
from grit_jax.from_config import (
    check_attention,
    check_tokenizer,
    cross_process_settings,
    describe_new_masking,
    make_batches,
    make_checkpoints,
    make_embedding_spec,
    make_held_out,
    make_schedule,
    make_trainer,
    open_adapter,
    open_pretrained,
)
from grit_jax.models import ModelConfig, lora_layers
from grit_jax.processes import broadcast_from_primary, is_primary
from grit_jax.training.checkpoints import CheckpointError, Checkpoints, RestartRequired
from grit_jax.training.flops import peak_flops
from grit_jax.training.hooks.bucket_mirror import BucketMirror
from grit_jax.training.hooks.metrics import METRICS, MetricsWriter, draw_curves, read_metrics
from grit_jax.training.hooks.profiler import Profiler
from grit_jax.training.hooks.progress import ProgressReport
from grit_jax.training.hooks.step_timer import Goodput, StepTimer
from grit_jax.training.hooks.stop_signals import Stopped, StopSignals
from grit_jax.training.hooks.trackers import Tracker, import_tracker, open_tracker
from grit_jax.training.hooks.watchdog import Watchdog
from grit_jax.training.loop import SkipGuard, StepReport, train
from grit_jax.training.train_step import Trainer, TrainState

# Datasets whose passes are printed.
MAX_NAMED_DATASETS = 20


def run(config: Config, workdir: epath.Path) -> None:
    """Trains a model, from the newest checkpoint in `workdir` if there is one.

    Mistakes in the configuration or the data raise errors before anything is compiled. All
    processes share the working directory. The run writes `config.json`, `metrics.jsonl`,
    `tensorboard/`, `curves.png`, `checkpoints/` and `compiled/` (compiled programs for the next
    start).

    Raises:
      ConfigError, MeshError, PreparedDataError, CheckpointError, BucketError: the message says what
        is wrong.
      ProcessError: the processes of the run differ in their settings, or do not share `workdir`.
      RestartRequired: another run uses `workdir`.
      TrackerError: the package of `config.tracker` is missing, or its run cannot be started.
      NotFiniteError: too many consecutive steps had a gradient that is not finite.
      Stopped: the process received SIGTERM or SIGINT, and the state is saved.
    """
    console = Console(quiet=not is_primary(), markup=False)  # Paths may contain [brackets].
    check_prepared(config)
    config = complete_config(config)
    if is_primary():
        import_tracker(config.tracker)
    pretrained = open_pretrained(config)
    trainer = make_trainer(config, pretrained)
    batches = make_batches(config, trainer)
    check_tokenizer(batches, pretrained)
    _, instructions = make_embedding_spec(config, batches, pretrained)
    if instructions:
        console.print(instructions, highlight=False, soft_wrap=True)
    passes = describe_passes(batches.passes(config.steps), config.steps)
    console.print(passes, highlight=False, soft_wrap=True)
    for sampler in batches.samplers.values():
        if sharing := sampler.describe_sharing():
            console.print(sharing, highlight=False, soft_wrap=True)
    held_out = make_held_out(config, trainer)
    check_attention(trainer, batches, held_out)
    if jax.process_count() > 1:
        check_agreement(cross_process_settings(config, batches, pretrained))
    with (
        _exclusive(workdir),
        contextlib.ExitStack() as after_checkpoints,
        compilation_cache(workdir / "compiled"),
        make_checkpoints(
            config, trainer, batches, workdir / "checkpoints", pretrained
        ) as checkpoints,
    ):
        state = _first_state(config, trainer, pretrained, checkpoints, console)
        if is_primary():
            _report_new_masking(config, batches, workdir / "config.json", console)
            _write_config(config, trainer.model_config, workdir / "config.json", state, console)
        with (
            _tracker(config, workdir, int(state.step)) as tracker,
            MetricsWriter(workdir, int(state.step), is_primary(), tracker) as metrics,
        ):
            is_evaluated = any(
                name.startswith("held_out/") for line in metrics.kept for name in line
            )
            if held_out is not None and not broadcast_from_primary(is_evaluated):
                _evaluate(held_out, state, metrics, console.print)
            if int(state.step) < config.steps:
                # Signals must not end the process until `checkpoints` has written the last one.
                stop_signals = after_checkpoints.enter_context(
                    StopSignals(checkpoints.newest_complete_step)
                )
                _train(
                    config,
                    trainer,
                    state,
                    batches,
                    checkpoints,
                    metrics,
                    held_out,
                    stop_signals,
                    console,
                )
    if is_primary():
        _show_results(workdir, held_out, console)


def _tracker(
    config: Config, workdir: epath.Path, step: int
) -> contextlib.AbstractContextManager[Tracker | None]:
    if not is_primary() or step >= config.steps:
        return contextlib.nullcontext()
    return open_tracker(config.tracker, workdir, step == 0, config.to_dict())


@contextlib.contextmanager
def _exclusive(workdir: epath.Path) -> Iterator[None]:
    """Makes the working directory and locks it. Folders in a bucket have no lock.

    Raises:
      BucketError, CheckpointError: it cannot be written to, or its disk is full.
      ProcessError: the processes do not share it.
      RestartRequired: another run uses it.
    """
    check_writing(workdir)
    busy = RestartRequired(
        f"{workdir}: another run uses this folder; wait until it ends, or choose another --workdir"
    )
    with contextlib.ExitStack() as until_the_end:
        is_free = True
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if is_primary() and not in_bucket(workdir):
                until_the_end.enter_context(locked(workdir, busy))
        except RestartRequired:
            is_free = False
        except OSError as error:
            raise CheckpointError(f"{workdir} cannot be written to: {one_line(error)}") from error
        if jax.process_count() > 1:
            check_shared(workdir)
        if not broadcast_from_primary(is_free):
            raise busy
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CheckpointError(
                f"{workdir}: the disk is full; free some space, and the same command continues "
                "from the newest checkpoint, which is intact"
            ) from error


def describe_passes(passes: Mapping[str, float], num_steps: int) -> str:
    """Returns a line about how many times a run reads each dataset, the most often read first."""
    ordered = sorted(passes.items(), key=lambda each: -each[1])
    named = [f"{name} {count:.3g}" for name, count in ordered[:MAX_NAMED_DATASETS]]
    if others := [count for _, count in ordered[MAX_NAMED_DATASETS:]]:
        named.append(f"{len(others)} others {others[-1]:.3g} to {others[0]:.3g}")
    return f"passes over each dataset in {num_steps:,} steps: {', '.join(named)}"


def _report_new_masking(
    config: Config, batches: Batches, path: epath.Path, console: Console
) -> None:
    """Says what changes for a run of an earlier version that is continued."""
    try:
        stored = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return
    if changed := describe_new_masking(config, batches, stored):
        console.print(changed, highlight=False, soft_wrap=True)


def _write_config(
    config: Config, model: ModelConfig, path: epath.Path, state: TrainState, console: Console
) -> None:
    """Writes config.json; prints the fields that have changed since the last start of the run."""
    fields = config.to_dict()
    sizes = dataclasses.asdict(model)
    fields["model"]["sizes"] = {name: sizes[name] for name in config.model.sizes}
    if int(state.step) and path.exists():
        with contextlib.suppress(ValueError):  # It is not needed to continue.
            now = json.loads(json.dumps(fields))  # With lists for tuples.
            for line in changed_fields(json.loads(path.read_bytes()), now):
                console.print(line, highlight=False, soft_wrap=True)
    write_json(path, fields)


def _first_state(
    config: Config,
    trainer: Trainer,
    pretrained: StoredModel | None,
    checkpoints: Checkpoints,
    console: Console,
) -> TrainState:
    """Returns the state to start with: the newest checkpoint, else the weights to start from."""
    restored = checkpoints.restore(trainer.abstract_state())
    if trainer.model_config.lora is not None:
        console.print(_describe_lora(trainer), highlight=False, soft_wrap=True)
    if restored is not None:
        step = int(restored.step)
        console.print(
            f"continuing from step {step} of {checkpoints.folder}"
            if step < config.steps
            else f"this run is finished, with {step} steps: to train further, raise "
            f"{'config.epochs' if config.epochs else 'config.steps'}",
            highlight=False,
            soft_wrap=True,
        )
        if trainer.model_config.lora is None or pretrained is None:
            return restored
        start = trainer.state_from(pretrained.load, config.seed)
        return dataclasses.replace(restored, frozen=start.frozen)
    if pretrained is not None:
        console.print(f"starting from {pretrained.folder}", highlight=False, soft_wrap=True)
        if not config.lora.adapter:
            return trainer.state_from(pretrained.load, config.seed)
        adapter = open_adapter(config, trainer, pretrained)
        console.print(f"and the adapter {adapter.folder}", highlight=False, soft_wrap=True)
        return trainer.state_from(adapter.load_unmerged, config.seed)
    count = _count_parameters(trainer.abstract_state().parameters)
    console.print(f"starting from {count:,} random parameters", highlight=False)
    return trainer.initial_state(config.seed)


def _describe_lora(trainer: Trainer) -> str:
    model, state = trainer.model_config, trainer.abstract_state()
    layers = ", ".join(lora_layers(model))
    return (
        f"training {_count_parameters(state.parameters):,} parameters with "
        f"{_count_parameters(state.frozen):,} frozen: LoRA of {layers}"
    )


def _count_parameters(parameters: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(parameters))


def _train(
    config: Config,
    trainer: Trainer,
    state: TrainState,
    batches: Batches,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    held_out: HeldOut | None,
    stop_signals: StopSignals,
    console: Console,
) -> None:
    start = int(state.step)
    with (
        ProgressReport(start, config.steps, console) as progress,
        Watchdog(config.watchdog_timeout_seconds) as watchdog,
        BucketMirror(metrics.workdir / "profile") as traces,
        Profiler(traces.local, config.profile.first_step, config.profile.num_steps) as profiler,
    ):
        step_timer = StepTimer(
            config.log_every_steps,
            config.steps,
            make_schedule(config),
            [metrics.write, progress.show],
            Goodput(metrics.kept),
            peak_flops(list(trainer.mesh.devices.flat)),
        )

        def evaluate_and_save(report: StepReport) -> None:
            is_last, held_out_metrics = report.step == config.steps, None
            every = config.evaluation.every_steps
            if held_out is not None and (is_last or (every and report.step % every == 0)):
                with step_timer.pause(report):
                    held_out_metrics = _evaluate(held_out, report.state, metrics, progress.log)
            is_stopping = stop_signals.is_due(report.step)
            if is_last or is_stopping or checkpoints.is_due(report.step):
                with step_timer.pause(report):
                    metrics.flush()
                    seconds = checkpoints.save(report.step, report.state, held_out_metrics)
                metrics.write(report.step, {"checkpoint_seconds": seconds})
            if is_stopping and not is_last:
                raise Stopped(report.step, stop_signals.exit_code)

        skip_guard = SkipGuard(config.optimizer.max_consecutive_skips)
        upcoming = read_ahead(batches, start, config.steps, config.data.data_threads)
        hooks = [watchdog, step_timer, skip_guard, evaluate_and_save, profiler]
        train(trainer, state, upcoming, hooks, progress.log)


def _evaluate(
    held_out: HeldOut,
    state: TrainState,
    metrics: MetricsWriter,
    log: Callable[[str], None],
) -> dict[str, float]:
    log("evaluating on held-out data ...")
    values = held_out.evaluate(state.model_parameters)
    metrics.write(int(state.step), {f"held_out/{name}": value for name, value in values.items()})
    return values


def _show_results(workdir: epath.Path, held_out: HeldOut | None, console: Console) -> None:
    lines = read_metrics(workdir / METRICS)
    draw_curves(lines, workdir / "curves.png")
    if held_out is not None:
        console.print(held_out_table(held_out, lines))
    for name in ("checkpoints", METRICS, "curves.png"):
        console.print(f"{name:15} {workdir / name}", highlight=False, soft_wrap=True)
