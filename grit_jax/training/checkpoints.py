"""Checkpoints of a run, with Orbax: saved in the background, whole or not there."""

from types import TracebackType
from typing import Any

from etils import epath
from flax import nnx
import jax
import orbax.checkpoint as ocp

from grit_jax.models import MistralConfig, config_to_hugging_face
from grit_jax.training.train_step import TrainState


class Checkpoints:
    """The checkpoints below a folder; a context, at whose end the last one is on disk.

    Each holds `parameters` (the model's, as a plain tree of arrays), `model_config` (its sizes, as
    Hugging Face's config.json holds them) and `optimizer_state`, all that the model can be read
    without.

    Args:
      folder: where they lie.
      model_config: the model's.
      every_steps: steps between two.
      keep: how many of the newest are kept.
    """

    def __init__(
        self, folder: epath.Path, model_config: MistralConfig, every_steps: int, keep: int
    ):
        self.folder = folder
        self._model_config = config_to_hugging_face(model_config)
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=every_steps, max_to_keep=keep, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, None without one."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, *, is_last: bool = False) -> bool:
        """Begins to save the state if its turn has come; returns whether it has.

        Args:
          step: number of steps made.
          state: what to save.
          is_last: save it in any case.
        """
        if step == self.latest_step:
            return False
        items = ocp.args.Composite(
            parameters=ocp.args.StandardSave(nnx.to_pure_dict(state.parameters)),
            model_config=ocp.args.JsonSave(self._model_config),
            optimizer_state=ocp.args.StandardSave(_besides_model(state)),
        )
        return self._manager.save(step, args=items, force=is_last)

    def restore(self, abstract: TrainState) -> TrainState:
        """Returns the newest checkpoint's state, laid out as `abstract` says.

        Raises:
          ValueError: it is of a model of other sizes.
        """
        step = self.latest_step
        assert step is not None, "there is a checkpoint to restore"
        items = ocp.args.Composite(
            parameters=ocp.args.StandardRestore(nnx.to_pure_dict(abstract.parameters)),
            optimizer_state=ocp.args.StandardRestore(_besides_model(abstract)),
        )
        restored = self._manager.restore(step, args=items)
        parameters = abstract.parameters
        nnx.replace_by_pure_dict(parameters, restored["parameters"])
        step_array = jax.device_put(jax.numpy.int32(step), abstract.step.sharding)
        besides = restored["optimizer_state"]
        return TrainState(step_array, parameters, besides["loss"], besides["optimizer"])


def _besides_model(state: TrainState) -> dict[str, Any]:
    return {"optimizer": state.optimizer_state, "loss": state.loss_parameters}
