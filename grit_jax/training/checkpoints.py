"""Checkpoints of a training run, saved in the background with Orbax."""

from collections.abc import Mapping
import dataclasses
import math
import time
from types import TracebackType
from typing import Any, Literal

from etils import epath
from flax import nnx
from flax.traverse_util import flatten_dict
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from grit_jax.bucket import one_line
from grit_jax.consistency import describe_differences
from grit_jax.fields import NonNegativeInt, PositiveInt
from grit_jax.models import ARCHITECTURES, ModelConfig, config_to_hugging_face
from grit_jax.objectives.embedding import GRIT_FIELD
from grit_jax.training.checkpoint_recovery import is_damage, quarantine, remove_unreadable_metrics
from grit_jax.training.orbax_files_handler import Files
from grit_jax.training.train_step import TrainState

# Fields of config.json that describe how a model is used. Parameters do not depend on them.
USAGE_FIELDS = (GRIT_FIELD, "bos_token_id", "eos_token_id")
# Former names of settings in the stored description of a run.
RENAMED_SETTINGS = {"moment_dtype": "mu_dtype"}

# Fields of the configuration, by the names of their settings in the description of a run.
FIELDS = {
    "data.seed": "config.seed",
    "data.embedding.batches": "config.data.embedding_batches",
    "data.embedding.batch_size": "config.data.embedding_batch_size",
    "data.embedding.group_size": "config.data.group_size",
    "data.generative.batches": "config.data.generative_batches",
    "data.generative.batch_size": "config.data.generative_batch_size",
    "trained.param_dtype": "config.model.param_dtype",
    "trained.mu_dtype": "config.optimizer.mu_dtype",
    "trained.learn_temperature": "config.loss.learn_temperature",
    **{f"lora.{name}": f"config.lora.{name}" for name in ("rank", "alpha", "targets")},
    **{
        f"model.{size}": f"config.model.sizes.{size}"
        for architecture in ARCHITECTURES.values()
        for size in architecture.sizes
    },
}


class CheckpointError(Exception):
    """A checkpoint cannot be written or read, or is of another run. The message says what to do."""


class RestartRequired(CheckpointError):
    """This process cannot continue the run, but a restart with the same command can."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetentionPolicy:
    """Which checkpoints are kept: those that any of the fields selects.

    Attributes:
      keep: number of newest checkpoints to keep.
      keep_every_steps: also keep checkpoints whose step is a multiple of this; 0 disables it.
      best_metric: also keep the best checkpoint by this held-out metric, such as "perplexity" or
        "faq/ndcg_at_10"; "" disables it.
      best_mode: whether a "max" or a "min" value of the metric is best.
    """

    keep: PositiveInt = 2
    keep_every_steps: NonNegativeInt = 0
    best_metric: str = ""
    best_mode: Literal["max", "min"] = "max"

    def to_orbax(self) -> checkpoint_managers.PreservationPolicy:
        """Returns the policy as Orbax's `CheckpointManager` takes it."""
        policies: list[Any] = [checkpoint_managers.LatestN(self.keep)]
        if self.keep_every_steps:
            policies.append(checkpoint_managers.EveryNSteps(self.keep_every_steps))
        if self.best_metric:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=self.metric_value,
                    reverse=self.best_mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        return checkpoint_managers.AnyPreservationPolicy(policies)

    def metric_value(self, metrics: Mapping[str, float]) -> float:
        """Returns the value of `best_metric`, or the worst possible value if it is NaN or missing.

        It is missing in checkpoints of an earlier start of the run that evaluated on other data.
        """
        value = metrics.get(self.best_metric, math.nan)
        if math.isnan(value):
            return math.inf if self.best_mode == "min" else -math.inf
        return value


class Checkpoints:
    """The checkpoints of a run, in a folder. A context manager that waits for the last one.

    A checkpoint has these items:
      parameters: the trained parameters, as a tree of arrays.
      model_config: the model's sizes, as Hugging Face's config.json stores them.
      tokenizer: the tokenizer's files, if known.
      optimizer_state: the state of the optimizer and of the loss. Inference does not need it.
      description: what must be the same for another start to continue the run.
      base_model: the folder of the frozen weights, in LoRA checkpoints only.

    Args:
      folder: the folder of the checkpoints.
      model_config: the configuration of the model.
      description: what identifies the run besides the model: its data and what is trained.
      every_steps: steps between checkpoints.
      retention: which checkpoints are kept.
      base_folder: the folder of the weights that LoRA updates belong to.
      usage: further fields of config.json: how the model embeds, and its BOS and EOS tokens.
      tokenizer: names and contents of the tokenizer's files, None if unknown.

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
            preservation_policy=retention.to_orbax(),
            # Without it, Orbax does not store the metrics that a continued run needs.
            best_fn=retention.metric_value if retention.best_metric else None,
            enable_async_checkpointing=True,
        )
        try:
            remove_unreadable_metrics(folder)
            self._manager = ocp.CheckpointManager(folder, options=options)
        except Exception as error:  # Orbax and file systems raise many types.
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
                raise self._write_error(failure) from failure

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def newest_complete_step(self) -> int | None:
        """Returns the step of the newest checkpoint that is completely written, None if none is."""
        return max(ocp.utils.checkpoint_steps(self.folder), default=None)

    def is_due(self, step: int) -> bool:
        """Returns whether the state after `step` steps should be saved."""
        return step % self._every_steps == 0 or self.latest_step is None

    def save(
        self, step: int, state: TrainState, metrics: Mapping[str, float] | None = None
    ) -> float:
        """Starts to save a state in the background; returns the seconds for which this blocked.

        This blocks until the previous checkpoint is on disk and the state has been copied.

        Args:
          step: number of steps made.
          state: the state to save.
          metrics: held-out metrics of this step, if there are any.

        Raises:
          CheckpointError: this checkpoint or the previous one cannot be written.
        """
        started = time.perf_counter()
        if step == self.latest_step:
            return 0.0
        items = ocp.args.Composite(
            parameters=ocp.args.StandardSave(nnx.to_pure_dict(state.parameters)),
            model_config=ocp.args.JsonSave(self._model_config),
            optimizer_state=ocp.args.StandardSave(_optimizer_item(state)),
            description=ocp.args.JsonSave(self._description),
            **({"base_model": ocp.args.JsonSave(self._base_model)} if self._base_model else {}),
            **({} if self._tokenizer is None else {"tokenizer": Files(self._tokenizer)}),
        )
        try:
            self._manager.save(step, args=items, metrics=metrics and dict(metrics), force=True)
        except Exception as failure:  # Orbax and file systems raise many types.
            raise self._write_error(failure) from failure
        return time.perf_counter() - started

    def restore(self, abstract: TrainState) -> TrainState | None:
        """Returns the state in the newest checkpoint, or None if there is no checkpoint.

        A damaged checkpoint is moved to the folder `damaged` with a warning, and the next older one
        is used.

        Args:
          abstract: shapes, types and shardings of the state. Frozen parameters are not stored in
            checkpoints; those of `abstract` are returned.

        Raises:
          CheckpointError: the checkpoint is of another model or other data, cannot be read for a
            reason other than damage, or all checkpoints are damaged. None is moved.
          RestartRequired: a damaged checkpoint was moved while other processes may be reading it.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: dict[int, Exception] = {}
        for step in steps:
            try:
                self._check_description(step)
                state = self._restore(step, abstract)
            except CheckpointError:
                raise
            except Exception as failure:  # Orbax and file systems raise many types.
                if not is_damage(failure):
                    raise self._read_error(step, failure) from failure
                damaged[step] = failure
                if jax.process_count() > 1 and step != steps[-1]:
                    self._quarantine(step, failure)
                continue
            for damaged_step, failure in damaged.items():
                self._quarantine(damaged_step, failure)
            return state
        if damaged:
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} can be read: replace them by intact "
                "copies, or start a new run with another --workdir. Error of the newest: "
                f"{one_line(damaged[steps[0]])}"
            )
        return None

    def _restore(self, step: int, abstract: TrainState) -> TrainState:
        items = ocp.args.Composite(
            parameters=ocp.args.StandardRestore(nnx.to_pure_dict(abstract.parameters)),
            optimizer_state=ocp.args.StandardRestore(_optimizer_item(abstract)),
        )
        restored = self._manager.restore(step, args=items)
        parameters = jax.tree.map(lambda leaf: leaf, abstract.parameters)
        nnx.replace_by_pure_dict(parameters, restored["parameters"])
        step_array = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        item = restored["optimizer_state"]
        return TrainState(step_array, parameters, item["loss"], item["optimizer"], abstract.frozen)

    def _check_description(self, step: int) -> None:
        items = ocp.args.Composite(
            model_config=ocp.args.JsonRestore(), description=ocp.args.JsonRestore()
        )
        stored = self._manager.restore(step, args=items)
        theirs = {"model": _sizes(stored["model_config"]), **_renamed(stored["description"])}
        ours = {"model": _sizes(self._model_config), **self._description}
        if differences := describe_differences(_by_field(theirs), _by_field(ours)):
            raise CheckpointError(
                f"{self.folder / str(step)} is of another run: {'; '.join(differences)}. Give the "
                "new run its own --workdir, or start it from these weights with "
                "--config.model.weights"
            )

    def _quarantine(self, step: int, failure: Exception) -> None:
        destination = quarantine(self.folder / str(step), failure)
        if jax.process_count() > 1:
            # Other processes may be blocked in a collective read.
            raise RestartRequired(
                f"{destination} is damaged: restart to continue from the checkpoint before it"
            )
        self._manager.reload()

    def _read_error(self, step: int, failure: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.folder / str(step)} cannot be read: {one_line(failure)}. It was not moved: the "
            "same command continues from it once the cause is fixed"
        )

    def _write_error(self, failure: Exception) -> CheckpointError:
        return CheckpointError(
            f"a checkpoint could not be written to {self.folder}; the earlier ones are intact "
            f"(newest: step {self.latest_step}). {one_line(failure)}"
        )


def _renamed(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored description with the current names of the settings of training."""
    trained = description.get("trained", {})
    renamed = {RENAMED_SETTINGS.get(name, name): value for name, value in trained.items()}
    return {**description, **({"trained": renamed} if renamed else {})}


def _by_field(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a description, by the names of their fields as far as they have one."""
    flat: dict[str, Any] = flatten_dict(  # pyright: ignore[reportAssignmentType]
        dict(description), sep="."
    )
    return {FIELDS.get(name, name): value for name, value in flat.items()}


def _sizes(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of config.json that parameters depend on.

    Older checkpoints store no others.
    """
    return {name: value for name, value in model_config.items() if name not in USAGE_FIELDS}


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    return {"optimizer": state.optimizer_state, "loss": state.loss_parameters}
