"""Checkpoints of a run, with Orbax: saved in the background, whole or not there."""

from collections.abc import Mapping
import dataclasses
import math
import time
from types import TracebackType
from typing import Any

from etils import epath
from flax import nnx
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from grit_jax.bucket import one_line
from grit_jax.consistency import describe_differences
from grit_jax.models import ModelConfig, config_to_hugging_face
from grit_jax.objectives.embedding import GRIT_FIELD
from grit_jax.training.checkpoint_recovery import forget_garbled_measures, is_damage, quarantine
from grit_jax.training.orbax_files_handler import Files
from grit_jax.training.train_step import TrainState

# Fields of config.json that say how a model is used.
USAGE = (GRIT_FIELD, "bos_token_id", "eos_token_id")


class CheckpointError(Exception):
    """A checkpoint cannot be written, or is of another run; the message says what to do."""


class RestartRequired(CheckpointError):
    """This process cannot go on, but the same command, started again, can."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetentionPolicy:
    """Which checkpoints are kept; one is if any of these says so.

    Attributes:
      keep: how many of the newest.
      keep_every_steps: those of steps that are multiples of it; 0 for none.
      best_metric: the best by this measure on held-out data, "" for none.
      best_mode: "max" or "min", whether more of it is better.
    """

    keep: int
    keep_every_steps: int = 0
    best_metric: str = ""
    best_mode: str = "max"

    def policy(self) -> checkpoint_managers.PreservationPolicy:
        """Returns it as Orbax puts it."""
        policies: list[Any] = [checkpoint_managers.LatestN(self.keep)]
        if self.keep_every_steps:
            policies.append(checkpoint_managers.EveryNSteps(self.keep_every_steps))
        if self.best_metric:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=self.measured,
                    reverse=self.best_mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return checkpoint_managers.AnyPreservationPolicy(policies)

    def measured(self, measures: Mapping[str, float]) -> float:
        """Returns what the best is chosen by: the worst there is where it is no number or missing.

        A checkpoint from before this run was continued may have been measured on other data.
        """
        value = measures.get(self.best_metric, math.nan)
        if math.isnan(value):
            return math.inf if self.best_mode == "min" else -math.inf
        return value


class Checkpoints:
    """The checkpoints below a folder; a context, at whose end the last one is on disk.

    Each holds `parameters` (those that are trained, as a plain tree of arrays), `model_config` (the
    model's sizes, as Hugging Face's config.json holds them), `tokenizer` (its files, if they are
    known), `optimizer_state`, all that the model can be read without, and `description`, what a run
    must share to go on from it. One of low-rank updates holds `base_model` besides, which says
    where the other parameters lie.

    Args:
      folder: where they lie.
      model_config: the model's.
      description: what else makes a run another one: its data and what is trained.
      every_steps: steps between two.
      retention: which are kept.
      base_folder: where the model of low-rank updates lies.
      usage: what else config.json says: how the model embeds, and what begins and ends a text.
      tokenizer: names and contents of the tokenizer's files, None where it is not known.

    Raises:
      CheckpointError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: epath.Path,
        model_config: ModelConfig,
        description: Mapping[str, Any],
        every_steps: int,
        retention: RetentionPolicy,
        base_folder: str | None = None,
        usage: Mapping[str, Any] | None = None,
        tokenizer: Mapping[str, bytes] | None = None,
    ):
        self.folder = folder
        self._model_config = config_to_hugging_face(model_config) | dict(usage or {})
        self._tokenizer = tokenizer
        self._description = dict(description)
        self._every_steps = every_steps
        self._base_model = {"folder": base_folder} if base_folder else None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=retention.policy(),
            # Orbax writes measures down only where it has this: a run that is continued reads them.
            best_fn=retention.measured if retention.best_metric else None,
            enable_async_checkpointing=True,
        )
        try:
            forget_garbled_measures(folder)
            self._manager = ocp.CheckpointManager(folder, options=options)
        except Exception as error:  # Whatever the file system's library makes of it.
            raise CheckpointError(f"{folder} cannot be written to: {one_line(error)}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._manager.close()
        except Exception as failure:
            if error is None:
                raise self._not_saved(failure) from failure

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, None without one."""
        return self._manager.latest_step()

    def is_due(self, step: int) -> bool:
        """Returns whether the state after `step` steps is to be saved."""
        return step % self._every_steps == 0 or self.latest_step is None

    def save(
        self, step: int, state: TrainState, measures: Mapping[str, float] | None = None
    ) -> float:
        """Begins to save the state; returns the seconds for which it held the caller up.

        It waits for the checkpoint before to be on disk, and for the copy of the state that is
        written in the background.

        Args:
          step: number of steps made.
          state: what to save.
          measures: on held-out data, if there are any of this step.

        Raises:
          CheckpointError: this checkpoint, or the one before, cannot be written.
        """
        started = time.perf_counter()
        if step == self.latest_step:
            return 0.0
        items = ocp.args.Composite(
            parameters=ocp.args.StandardSave(nnx.to_pure_dict(state.parameters)),
            model_config=ocp.args.JsonSave(self._model_config),
            optimizer_state=ocp.args.StandardSave(_besides_model(state)),
            description=ocp.args.JsonSave(self._description),
            **({"base_model": ocp.args.JsonSave(self._base_model)} if self._base_model else {}),
            **({} if self._tokenizer is None else {"tokenizer": Files(self._tokenizer)}),
        )
        try:
            self._manager.save(step, args=items, metrics=measures and dict(measures), force=True)
        except Exception as failure:  # Whatever the file system's library makes of it.
            raise self._not_saved(failure) from failure
        return time.perf_counter() - started

    def restore(self, abstract: TrainState) -> TrainState | None:
        """Returns the newest checkpoint's state, laid out as `abstract` says, or None.

        What is frozen is not in a checkpoint, and stays as it is in `abstract`.

        A damaged checkpoint is moved to `damaged`, with a warning, and the one before is taken.

        Raises:
          CheckpointError: the checkpoint is of another model or of other data; or it cannot be
            read, but not because it is damaged; or all of them are. It stays where it is.
          RestartRequired: a damaged one was moved, which other processes may be reading.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: dict[int, Exception] = {}
        for step in steps:
            try:
                self._check_description(step)
                state = self._restore(step, abstract)
            except CheckpointError:
                raise
            except Exception as failure:  # Whatever the libraries below make of it.
                if not is_damage(failure):
                    raise self._not_read(step, failure) from failure
                damaged[step] = failure
                if jax.process_count() > 1 and step != steps[-1]:
                    self._set_aside(step, failure)
                continue
            for damaged_step, failure in damaged.items():
                self._set_aside(damaged_step, failure)
            return state
        if damaged:
            raise self._none_read(damaged[steps[0]])
        return None

    def _restore(self, step: int, abstract: TrainState) -> TrainState:
        items = ocp.args.Composite(
            parameters=ocp.args.StandardRestore(nnx.to_pure_dict(abstract.parameters)),
            optimizer_state=ocp.args.StandardRestore(_besides_model(abstract)),
        )
        restored = self._manager.restore(step, args=items)
        parameters = jax.tree.map(lambda leaf: leaf, abstract.parameters)
        nnx.replace_by_pure_dict(parameters, restored["parameters"])
        step_array = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        besides = restored["optimizer_state"]
        return TrainState(
            step_array, parameters, besides["loss"], besides["optimizer"], abstract.frozen
        )

    def _check_description(self, step: int) -> None:
        items = ocp.args.Composite(
            model_config=ocp.args.JsonRestore(), description=ocp.args.JsonRestore()
        )
        stored = self._manager.restore(step, args=items)
        theirs = {"model": _sizes(stored["model_config"]), **stored["description"]}
        ours = {"model": _sizes(self._model_config), **self._description}
        if differences := describe_differences(theirs, ours):
            raise CheckpointError(
                f"{self.folder / str(step)} is of another run: {'; '.join(differences)}. Give the "
                "new run a --workdir of its own, or start it from these weights with "
                "--config.model.weights"
            )

    def _set_aside(self, step: int, failure: Exception) -> None:
        destination = quarantine(self.folder / str(step), failure)
        if jax.process_count() > 1:
            # The others may be waiting for this process in the middle of reading.
            raise RestartRequired(f"{destination} is damaged: start again, from the one before")
        self._manager.reload()

    def _not_read(self, step: int, failure: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.folder / str(step)} cannot be read: {one_line(failure)}. It stays where it is: "
            "the same command goes on from it when that is mended"
        )

    def _none_read(self, failure: Exception) -> CheckpointError:
        return CheckpointError(
            f"none of the checkpoints in {self.folder} can be read; put whole ones in their place, "
            f"or begin anew with another --workdir. Of the newest: {one_line(failure)}"
        )

    def _not_saved(self, failure: Exception) -> CheckpointError:
        return CheckpointError(
            f"a checkpoint could not be written to {self.folder}; those already there are whole "
            f"(newest: step {self.latest_step}). {one_line(failure)}"
        )


def _sizes(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a model's parameters depend on; older checkpoints know no more of it."""
    return {name: value for name, value in model_config.items() if name not in USAGE}


def _besides_model(state: TrainState) -> dict[str, Any]:
    return {"optimizer": state.optimizer_state, "loss": state.loss_parameters}
