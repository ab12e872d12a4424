"""The state of a training run, created on the mesh, and the train step."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import optax

from grit_jax.data.batch import Batch, PackedTexts
from grit_jax.models import Decoder, ModelConfig, make_model
from grit_jax.models.remat import HOST_MEMORY
from grit_jax.pytree import pytree_dataclass
from grit_jax.sharding import MeshError, check_sizes_fit_mesh, partition_spec, variable_shardings
from grit_jax.training.grad_cache import chunked_value_and_grad
from grit_jax.training.loss import Loss, Losses

# Metric -> the field of the optimizer's state that holds it (`optax.apply_if_finite`).
SKIP_METRICS = {
    "steps_skipped": "total_notfinite",
    "steps_skipped_in_a_row": "notfinite_count",
}


@pytree_dataclass
class TrainState:
    """The state of a run between two steps.

    Attributes:
      step: number of steps taken.
      parameters: NNX state of the model's trained parameters.
      loss_parameters: parameters that the loss itself learns, by name; may be empty.
      optimizer_state: state of the optax optimizer.
      frozen: NNX state of the model's other parameters; empty if all are trained.
    """

    step: Any
    parameters: Any
    loss_parameters: Any
    optimizer_state: Any
    frozen: Any

    @property
    def trained(self) -> dict[str, Any]:
        """All parameters that the optimizer updates: "model" and "loss"."""
        return {"model": self.parameters, "loss": self.loss_parameters}

    @property
    def model_parameters(self) -> nnx.State:
        """All parameters of the model, trained and frozen."""
        return nnx.merge_state(self.parameters, self.frozen)


class Trainer:
    """Creates and advances training states, for a model, a loss and an optimizer on a mesh.

    Args:
      model_config: configuration of the model.
      loss: the loss to minimize.
      optimizer: an optax optimizer of the tree {"model": ..., "loss": ...}.
      mesh: the devices.
      grad_cache_chunks: number of chunks in which a batch is processed, see `grad_cache`.

    Attributes:
      step: the compiled train step, from a state and a batch on the devices to the next state and
        the metrics. It donates the memory of the state.

    Raises:
      MeshError: the mesh does not divide the model.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        grad_cache_chunks: int = 1,
    ):
        check_model_fits_mesh(model_config, mesh)
        self.model_config = model_config
        self.loss = loss
        self.optimizer = optimizer
        self.mesh = mesh
        self.grad_cache_chunks = grad_cache_chunks
        self._is_trained = trained_parameters(model_config)
        self.model_graph, _ = nnx.split(nnx.eval_shape(lambda: make_model(model_config, 0)))
        self.shardings = self._state_shardings()
        self.step: Callable[[TrainState, Batch], tuple[TrainState, dict]] = jax.jit(
            self._step, donate_argnums=0, out_shardings=(self.shardings, None)
        )

    def abstract_state(self) -> TrainState:
        """Returns the shapes, dtypes and shardings of the state, without allocating it."""
        shapes = jax.eval_shape(lambda: self._initial_state(0))
        return jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=sharding
            ),
            shapes,
            self.shardings,
        )

    def initial_state(self, seed: int) -> TrainState:
        """Returns a state with random parameters, initialized with their shardings."""
        with jax.set_mesh(self.mesh):
            return jax.jit(self._initial_state, static_argnums=0, out_shardings=self.shardings)(
                seed
            )

    def state_from(self, load: Callable[[dict[str, Any]], dict[str, Any]], seed: int) -> TrainState:
        """Returns the initial state of a run that starts from given parameters.

        Args:
          load: returns the parameters as nested dictionaries of global arrays, given a
            `jax.ShapeDtypeStruct` with a sharding for each. Parameters that it leaves out are
            initialized at random.
          seed: seed of the random parameters.
        """
        parameters = self.abstract_state().model_parameters
        given = flatten_dict(load(nnx.to_pure_dict(parameters)))
        shardings = flatten_dict(nnx.to_pure_dict(self.shardings.model_parameters))
        missing = {path: sharding for path, sharding in shardings.items() if path not in given}

        def initial() -> dict[Any, Any]:
            random = flatten_dict(nnx.to_pure_dict(self._initial_state(seed).model_parameters))
            return {path: random[path] for path in missing}

        with jax.set_mesh(self.mesh):
            if missing:
                given |= jax.jit(initial, out_shardings=missing)()
            nnx.replace_by_pure_dict(parameters, unflatten_dict(given))
            start = jax.jit(self._state_of, out_shardings=self.shardings, donate_argnums=0)
            return start(parameters)

    def model(self, parameters: nnx.State) -> Decoder:
        """Returns the model with these parameters, trained and frozen."""
        return nnx.merge(self.model_graph, parameters)

    def to_devices(self, batch: Any) -> Any:
        """Returns host arrays as global arrays: rows split over data shards, others replicated.

        Args:
          batch: a tree of arrays, in which rows are `PackedTexts`. Each process passes the rows of
            its own devices (`local_shards`), or all rows.
        """
        rows = NamedSharding(self.mesh, partition_spec("batch"))
        replicated = NamedSharding(self.mesh, PartitionSpec())

        def to_global(node: Any) -> Any:
            sharding, shape = replicated, None
            if isinstance(node, PackedTexts):
                sharding, shape = rows, (node.num_rows or len(node.tokens), node.tokens.shape[1])
            return jax.tree.map(
                lambda array: jax.make_array_from_process_local_data(
                    sharding, array, shape or array.shape
                ),
                node,
            )

        return jax.tree.map(to_global, batch, is_leaf=lambda node: isinstance(node, PackedTexts))

    def _initial_state(self, seed: int) -> TrainState:
        _, parameters = nnx.split(make_model(self.model_config, seed))
        return self._state_of(parameters)

    def _state_of(self, parameters: nnx.State) -> TrainState:
        trained, frozen = nnx.split_state(parameters, self._is_trained, ...)
        loss_parameters = self.loss.initial_parameters()
        state = TrainState(jnp.zeros((), jnp.int32), trained, loss_parameters, None, frozen)
        return dataclasses.replace(state, optimizer_state=self.optimizer.init(state.trained))

    def _state_shardings(self) -> TrainState:
        """Returns the shardings of the state; moments are sharded like their parameters."""
        shapes = jax.eval_shape(lambda: self._initial_state(0))
        replicated = NamedSharding(self.mesh, PartitionSpec())
        state = TrainState(
            step=replicated,
            parameters=variable_shardings(shapes.parameters, self.mesh),
            loss_parameters=jax.tree.map(lambda _: replicated, shapes.loss_parameters),
            optimizer_state=None,
            frozen=variable_shardings(shapes.frozen, self.mesh),
        )
        of_optimizer = optax.tree.map_params(
            self.optimizer,
            lambda _, sharding: sharding,
            shapes.optimizer_state,
            state.trained,
            transform_non_params=lambda _: replicated,
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
        return dataclasses.replace(state, optimizer_state=of_optimizer)

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        losses, gradient = self._losses_and_gradient(state.trained, state.frozen, batch)
        updates, optimizer_state = self.optimizer.update(
            gradient, state.optimizer_state, state.trained
        )
        trained: dict[str, Any] = optax.apply_updates(state.trained, updates)  # pyright: ignore[reportAssignmentType]
        # optax would sum squares of bfloat16 in bfloat16.
        gradient_norm = optax.tree.norm(optax.tree.cast(gradient, jnp.float32))
        metrics = {**losses, "gradient_norm": gradient_norm}
        for name, field in SKIP_METRICS.items():
            if (count := optax.tree.get(optimizer_state, field)) is not None:
                metrics[name] = count
        next_state = TrainState(
            state.step + 1, trained["model"], trained["loss"], optimizer_state, state.frozen
        )
        return next_state, metrics

    def _losses_and_gradient(
        self, trained: dict[str, Any], frozen: nnx.State, batch: Batch
    ) -> tuple[Losses, dict[str, Any]]:
        def model_of(trained: dict[str, Any]) -> Decoder:
            return self.model(nnx.merge_state(trained["model"], frozen))

        def value(trained: dict[str, Any]) -> tuple[jax.Array, Losses]:
            return self.loss.value(model_of(trained), trained["loss"], batch)

        if self.grad_cache_chunks == 1:
            gradient, losses = jax.grad(value, has_aux=True)(trained)
            return losses, gradient
        return chunked_value_and_grad(
            model_of,
            trained,
            batch,
            self.loss,
            self.grad_cache_chunks,
            lambda gradient: jax.lax.with_sharding_constraint(gradient, self.shardings.trained),
        )


def trained_parameters(config: ModelConfig) -> Any:
    """Returns the NNX filter of the trained parameters.

    Without LoRA these are all parameters. With LoRA these are its matrices and the embedding
    projection, which the base model has not learned.
    """
    if config.lora is None:
        return nnx.Param
    return nnx.Any(nnx.LoRAParam, nnx.PathContains("embedding_projection"))


def check_model_fits_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Checks that the mesh divides the model, and that its devices have the memory it needs.

    Raises:
      MeshError: a check fails; the message names the configuration fields.
    """
    if config.remat == "offload":
        # Devices of other processes list no memories.
        memories = [m.kind for device in mesh.devices.flat for m in device.addressable_memories()]
        if HOST_MEMORY not in memories:
            raise MeshError(
                f"config.model.remat='offload' requires devices with `{HOST_MEMORY}` memory; "
                f"{mesh.devices.flat[0].platform} has none: use 'save_matmuls', which saves the "
                "same arrays on the device"
            )
    num_expert_shards = mesh.shape["expert"]
    if num_expert_shards > 1 and not config.has_experts:
        raise MeshError(f"config.mesh.expert={num_expert_shards} is for a Mixtral: leave it at 1")
    check_sizes_fit_mesh(config.sharded_sizes(), mesh)
