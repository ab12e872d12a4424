"""From a configuration to a finished run: state, loop, and the table at the end."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import errno
import os

from etils import epath
import jax
from rich.console import Console

from grit_jax.bucket import check_writing, in_bucket, one_line
from grit_jax.config import Config, check_fields
from grit_jax.consistency import check_agreement, check_shared
from grit_jax.conversion import Model
from grit_jax.data.batches import Batches, read_ahead
from grit_jax.evaluation.held_out import HeldOut
from grit_jax.evaluation.table import result_table
from grit_jax.files import locked, write_json
from grit_jax.from_config import (
    check_attention,
    check_tokenizer,
    cross_process_settings,
    make_batches,
    make_checkpoints,
    make_held_out,
    make_schedule,
    make_trainer,
    open_pretrained,
)
from grit_jax.models import ModelConfig, lora_layers
from grit_jax.processes import broadcast_from_primary, is_primary
from grit_jax.training.checkpoints import CheckpointError, Checkpoints, RestartRequired
from grit_jax.training.flops import peak_flops
from grit_jax.training.hooks.bucket_mirror import Mirror
from grit_jax.training.hooks.metrics import METRICS, MetricsWriter, draw_curves, read_metrics
from grit_jax.training.hooks.preemption import Preempted, Preemption
from grit_jax.training.hooks.profiler import Profile
from grit_jax.training.hooks.progress import ProgressReport
from grit_jax.training.hooks.step_timer import Goodput, StepTimer
from grit_jax.training.hooks.watchdog import Watchdog
from grit_jax.training.loop import SkipGuard, StepReport, train
from grit_jax.training.train_step import Trainer, TrainState


def run(config: Config, workdir: epath.Path) -> None:
    """Trains as the configuration says, from the newest checkpoint in `workdir` if there is one.

    All that can be wrong with the configuration or the data shows before anything is compiled.
    The working directory, which all processes share, ends up with `config.json`, `metrics.jsonl`,
    `tensorboard/`, `curves.png`, `checkpoints/` and `compiled/`, programs for the next start.

    Raises:
      ConfigError, MeshError, PreparedDataError, CheckpointError, BucketError: the message names
        what is wrong.
      ProcessError: the processes of the run were not started alike, or share no `workdir`.
      RestartRequired: another run is at work in `workdir`.
      NotFiniteError: too many steps in a row had a gradient that is not finite.
      Preempted: the machine is to go, and the state is saved.
    """
    console = Console(quiet=not is_primary(), markup=False)  # A folder may be named [so].
    check_fields(config.to_dict())
    pretrained = open_pretrained(config)
    trainer = make_trainer(config, pretrained)
    batches = make_batches(config, trainer)
    check_tokenizer(batches, pretrained)
    held_out = make_held_out(config, trainer)
    check_attention(trainer, batches, held_out)
    if jax.process_count() > 1:
        check_agreement(cross_process_settings(config, batches, pretrained))
    with (
        _own_folder(workdir),
        contextlib.ExitStack() as until_closed,
        _compiled_programs(workdir / "compiled"),
        make_checkpoints(config, trainer, batches, workdir / "checkpoints", pretrained) as saved,
    ):
        state = _first_state(config, trainer, pretrained, saved, console)
        if is_primary():
            _keep_config(config, trainer.model_config, workdir / "config.json")
        with MetricsWriter(workdir, int(state.step), is_primary()) as record:
            is_measured = any(name.startswith("held_out/") for line in record.kept for name in line)
            if held_out is not None and not broadcast_from_primary(is_measured):
                _measure(held_out, state, record, console.print)
            if int(state.step) < config.steps:
                # The last checkpoint is written when `saved` is closed.
                preemption = until_closed.enter_context(Preemption())
                _train(
                    config, trainer, state, batches, saved, record, held_out, preemption, console
                )
    if is_primary():
        _show_results(workdir, held_out, console)


@contextlib.contextmanager
def _own_folder(workdir: epath.Path) -> Iterator[None]:
    """Makes the working directory; a context in which no other run on its disk is at work there.

    Raises:
      BucketError, CheckpointError: it cannot be written to, or its disk is full.
      ProcessError: it is not the same for all processes.
      RestartRequired: another run is at work there.
    """
    check_writing(workdir)
    busy = RestartRequired(
        f"{workdir}: another run is at work there; wait for its end, or take another --workdir"
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
                f"{workdir} has no room left: make some, and the same command goes on from the "
                "newest checkpoint, which is whole"
            ) from error


def _keep_config(config: Config, model: ModelConfig, path: epath.Path) -> None:
    resolved = config.to_dict()
    sizes = resolved["model"]["sizes"]
    resolved["model"]["sizes"] = {name: getattr(model, name) for name in sizes}
    write_json(path, resolved)


@contextlib.contextmanager
def _compiled_programs(folder: epath.Path) -> Iterator[None]:
    """A context in which programs are kept for the next start, unless JAX is told where itself."""
    options = {"jax_compilation_cache_dir": os.fspath(folder)}
    if in_bucket(folder):
        # What XLA keeps there itself, on GPUs, it could write to disks alone.
        options["jax_persistent_cache_enable_xla_caches"] = "none"
    before = {name: getattr(jax.config, name) for name in options}
    if not before["jax_compilation_cache_dir"]:
        _update_jax(options)
    try:
        yield
    finally:
        _update_jax(before)


def _update_jax(options: dict[str, str]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)


def _first_state(
    config: Config,
    trainer: Trainer,
    pretrained: Model | None,
    saved: Checkpoints,
    console: Console,
) -> TrainState:
    restored = saved.restore(trainer.abstract_state())
    if trainer.model_config.lora is not None:
        console.print(_say_what_is_trained(trainer), highlight=False, soft_wrap=True)
    if restored is not None:
        console.print(f"continuing from step {restored.step} of {saved.folder}", highlight=False)
        if trainer.model_config.lora is None or pretrained is None:
            return restored
        start = trainer.state_from(pretrained.load, config.seed)
        return dataclasses.replace(restored, frozen=start.frozen)
    if pretrained is not None:
        console.print(f"starting from {pretrained.folder}", highlight=False, soft_wrap=True)
        return trainer.state_from(pretrained.load, config.seed)
    count = sum(leaf.size for leaf in jax.tree.leaves(trainer.abstract_state().parameters))
    console.print(f"{count:,} parameters, at random", highlight=False)
    return trainer.initial_state(config.seed)


def _say_what_is_trained(trainer: Trainer) -> str:
    model, state = trainer.model_config, trainer.abstract_state()
    assert model.lora is not None
    trained, frozen = (
        sum(leaf.size for leaf in jax.tree.leaves(parameters))
        for parameters in (state.parameters, state.frozen)
    )
    layers = ", ".join(lora_layers(model))
    return f"training {trained:,} parameters beside {frozen:,} that stay: updates of {layers}"


def _train(
    config: Config,
    trainer: Trainer,
    state: TrainState,
    batches: Batches,
    saved: Checkpoints,
    record: MetricsWriter,
    held_out: HeldOut | None,
    preemption: Preemption,
    console: Console,
) -> None:
    start = int(state.step)
    with (
        ProgressReport(start, config.steps, console) as progress,
        Watchdog(config.watchdog_timeout_seconds) as watchdog,
        Mirror(record.workdir / "profile") as traces,
        Profile(traces.local, **config.profile.to_dict()) as profile,
    ):
        stopwatch = StepTimer(
            config.log_every_steps,
            config.steps,
            make_schedule(config),
            [record.write, progress.show],
            Goodput(record.kept),
            peak_flops(list(trainer.mesh.devices.flat)),
        )

        def measure_and_save(report: StepReport) -> None:
            is_last, measures = report.step == config.steps, None
            every = config.evaluation.every_steps
            if held_out is not None and (is_last or (every and report.step % every == 0)):
                with stopwatch.pause(report):
                    measures = _measure(held_out, report.state, record, progress.say)
            is_preempted = preemption.is_due(report.step)
            if is_last or is_preempted or saved.is_due(report.step):
                with stopwatch.pause(report):
                    record.flush()
                    seconds = saved.save(report.step, report.state, measures)
                record.write(report.step, {"checkpoint_seconds": seconds})
            if is_preempted and not is_last:
                raise Preempted(f"the machine is to go: saved after step {report.step}")

        most_skipped = SkipGuard(config.optimizer.max_consecutive_skips)
        coming = read_ahead(batches, start, config.steps, config.data.data_threads)
        hooks = [watchdog, stopwatch, most_skipped, measure_and_save, profile]
        train(trainer, state, coming, hooks, progress.say)


def _measure(
    held_out: HeldOut,
    state: TrainState,
    record: MetricsWriter,
    say: Callable[[str], None],
) -> dict[str, float]:
    say("measuring on held-out data ...")
    measures = held_out.measure(state.model_parameters)
    prefixed = {f"held_out/{name}": value for name, value in measures.items()}
    record.write(int(state.step), prefixed)
    return measures


def _show_results(workdir: epath.Path, held_out: HeldOut | None, console: Console) -> None:
    lines = read_metrics(workdir / METRICS)
    draw_curves(lines, workdir / "curves.png")
    if held_out is not None:
        console.print(result_table(held_out, lines))
    for name in ("checkpoints", METRICS, "curves.png"):
        console.print(f"{name:15} {workdir / name}", highlight=False, soft_wrap=True)
