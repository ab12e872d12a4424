"""The state of training, made on the mesh, and the step that advances it."""

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
from grit_jax.sharding import MeshError, check_sizes_fit_mesh, partition_spec, variable_shardings
from grit_jax.training.grad_cache import chunked_value_and_grad
from grit_jax.training.joint_loss import LossConfig, initial_loss_parameters, joint_loss

# Metrics, and the fields of the optimizer's state that hold them (`optax.apply_if_finite`).
SKIP_METRICS = {
    "steps_skipped": "total_notfinite",
    "steps_skipped_in_a_row": "notfinite_count",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on.

    Attributes:
      step: number of steps made.
      parameters: NNX state of what is trained of the model.
      loss_parameters: what the loss itself learns, by name; empty if nothing.
      optimizer_state: optax's state.
      frozen: NNX state of the rest of the model; empty if all of it is trained.
    """

    step: Any
    parameters: Any
    loss_parameters: Any
    optimizer_state: Any
    frozen: Any

    @property
    def trained(self) -> dict[str, Any]:
        """All that the optimizer moves: "model" and "loss"."""
        return {"model": self.parameters, "loss": self.loss_parameters}

    @property
    def model_parameters(self) -> nnx.State:
        """All parameters of the model, trained and frozen."""
        return nnx.merge_state(self.parameters, self.frozen)


class Trainer:
    """A model, a loss and an optimizer, bound to a mesh: makes states, and steps from one on.

    Args:
      model_config: sizes of the model.
      loss_config: of the joint loss.
      optimizer: an optax optimizer.
      mesh: the devices.
      grad_cache_chunks: number of parts in which a batch is read, see `grad_cache`.

    Raises:
      MeshError: the mesh does not divide the model.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        loss_config: LossConfig,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        grad_cache_chunks: int = 1,
    ):
        check_model_fits_mesh(model_config, mesh)
        self.model_config = model_config
        self.loss_config = loss_config
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
        """Returns the shapes, types and shardings of the state, taking no memory."""
        shapes = jax.eval_shape(lambda: self._initial_state(0))
        return jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=sharding
            ),
            shapes,
            self.shardings,
        )

    def initial_state(self, seed: int) -> TrainState:
        """Returns a state with random parameters, each made where it belongs."""
        with jax.set_mesh(self.mesh):
            return jax.jit(self._initial_state, static_argnums=0, out_shardings=self.shardings)(
                seed
            )

    def state_from(self, load: Callable[[dict[str, Any]], dict[str, Any]], seed: int) -> TrainState:
        """Returns the first state of a run that starts from given parameters.

        Args:
          load: returns the parameters as nested dictionaries of global arrays, given a
            `jax.ShapeDtypeStruct` with a sharding for each; those that it leaves out are random.
          seed: of the random ones.
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
        """Returns the model with these parameters, which are all that it has."""
        return nnx.merge(self.model_graph, parameters)

    def to_devices(self, batch: Any) -> Any:
        """Returns a tree of host arrays as global arrays: rows over data shards, the rest whole.

        Of rows each process gives those of its own devices (`local_shards`), or all of them.
        """
        rows = NamedSharding(self.mesh, partition_spec("batch"))
        whole = NamedSharding(self.mesh, PartitionSpec())

        def place(node: Any) -> Any:
            sharding, shape = whole, None
            if isinstance(node, PackedTexts):
                sharding, shape = rows, (node.num_rows or len(node.tokens), node.tokens.shape[1])
            return jax.tree.map(
                lambda array: jax.make_array_from_process_local_data(
                    sharding, array, shape or array.shape
                ),
                node,
            )

        return jax.tree.map(place, batch, is_leaf=lambda node: isinstance(node, PackedTexts))

    def _initial_state(self, seed: int) -> TrainState:
        _, parameters = nnx.split(make_model(self.model_config, seed))
        return self._state_of(parameters)

    def _state_of(self, parameters: nnx.State) -> TrainState:
        trained, frozen = nnx.split_state(parameters, self._is_trained, ...)
        loss_parameters = initial_loss_parameters(self.loss_config)
        state = TrainState(jnp.zeros((), jnp.int32), trained, loss_parameters, None, frozen)
        return dataclasses.replace(state, optimizer_state=self.optimizer.init(state.trained))

    def _state_shardings(self) -> TrainState:
        """Returns the shardings of the state: moments lie as their parameters do."""
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
        parts, gradient = self._loss_and_gradient(state.trained, state.frozen, batch)
        updates, optimizer_state = self.optimizer.update(
            gradient, state.optimizer_state, state.trained
        )
        trained: dict[str, Any] = optax.apply_updates(state.trained, updates)  # pyright: ignore[reportAssignmentType]
        # Squares of bfloat16 would be added up in bfloat16.
        gradient_norm = optax.tree.norm(optax.tree.cast(gradient, jnp.float32))
        metrics = {**parts, "gradient_norm": gradient_norm}
        for name, field in SKIP_METRICS.items():
            if (count := optax.tree.get(optimizer_state, field)) is not None:
                metrics[name] = count
        next_state = TrainState(
            state.step + 1, trained["model"], trained["loss"], optimizer_state, state.frozen
        )
        return next_state, metrics

    def _loss_and_gradient(
        self, trained: dict[str, Any], frozen: nnx.State, batch: Batch
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        def model_of(trained: dict[str, Any]) -> Decoder:
            return self.model(nnx.merge_state(trained["model"], frozen))

        def loss(trained: dict[str, Any]):
            return joint_loss(model_of(trained), trained["loss"], batch, self.loss_config)

        if self.grad_cache_chunks == 1:
            (_, parts), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
            return parts, gradient
        return chunked_value_and_grad(
            model_of,
            trained,
            batch,
            self.loss_config,
            self.grad_cache_chunks,
            lambda gradient: jax.lax.with_sharding_constraint(gradient, self.shardings.trained),
        )


def trained_parameters(config: ModelConfig) -> Any:
    """Returns NNX's filter of the parameters that are trained.

    These are all, or of a model with low-rank updates those alone, and the layer that makes
    embeddings, which a base model has not learned.
    """
    if config.lora is None:
        return nnx.Param
    return nnx.Any(nnx.LoRAParam, nnx.PathContains("embedding_projection"))


def check_model_fits_mesh(config: ModelConfig, mesh: Mesh) -> None:
    """Checks that the mesh can split the model so, and has the memory that the model names.

    Raises:
      MeshError: it cannot; the message names the model's field and the mesh's.
    """
    if config.remat == "offload":
        # Those of other processes tell of no memory.
        memories = [m.kind for device in mesh.devices.flat for m in device.addressable_memories()]
        if HOST_MEMORY not in memories:
            raise MeshError(
                f"config.model.remat='offload' needs devices with the memory {HOST_MEMORY}, which "
                f"a {mesh.devices.flat[0].platform} has not; 'save_matmuls' saves the same on the "
                "device"
            )
    ways = mesh.shape["expert"]
    if ways > 1 and not config.has_experts:
        raise MeshError(f"config.mesh.expert={ways} is for a Mixtral: leave it at 1")
    check_sizes_fit_mesh(config.sharded_sizes(), mesh)
