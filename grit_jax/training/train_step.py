"""The state of training, made on the mesh, and the step that advances it."""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import optax

from grit_jax.data.batch import Batch, PackedTexts
from grit_jax.models import Mistral, MistralConfig, make_model
from grit_jax.sharding import MeshError, partition_spec, variable_shardings
from grit_jax.training.joint_loss import LossConfig, joint_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run needs to go on.

    Attributes:
      step: number of steps made.
      parameters: NNX state of the model.
      optimizer_state: optax's state.
    """

    step: Any
    parameters: Any
    optimizer_state: Any


class Trainer:
    """A model, a loss and an optimizer, bound to a mesh: makes states, and steps from one on.

    Args:
      model_config: sizes of the model.
      loss_config: of the joint loss.
      optimizer: an optax optimizer.
      mesh: the devices.

    Raises:
      MeshError: the mesh does not divide the model.
    """

    def __init__(
        self,
        model_config: MistralConfig,
        loss_config: LossConfig,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
    ):
        check_model_fits_mesh(model_config, mesh)
        self.model_config = model_config
        self.loss_config = loss_config
        self.optimizer = optimizer
        self.mesh = mesh
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

    def state_from(self, load: Callable[[dict[str, Any]], dict[str, Any]]) -> TrainState:
        """Returns the first state of a run that starts from given parameters.

        Args:
          load: returns the parameters as nested dictionaries of global arrays, given a
            `jax.ShapeDtypeStruct` with a sharding for each.
        """
        abstract = self.abstract_state()
        parameters = abstract.parameters
        nnx.replace_by_pure_dict(parameters, load(nnx.to_pure_dict(parameters)))
        with jax.set_mesh(self.mesh):
            optimizer_state = jax.jit(
                self.optimizer.init, out_shardings=self.shardings.optimizer_state
            )(parameters)
            step = jax.device_put(jnp.zeros((), jnp.int32), self.shardings.step)
        return TrainState(step, parameters, optimizer_state)

    def model(self, parameters: nnx.State) -> Mistral:
        """Returns the model with these parameters."""
        return nnx.merge(self.model_graph, parameters)

    def to_devices(self, batch: Any) -> Any:
        """Returns a tree of host arrays as global arrays: rows over data shards, the rest whole.

        Of rows each process gives those of its own devices (`held_shards`), or all of them.
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
        return TrainState(jnp.zeros((), jnp.int32), parameters, self.optimizer.init(parameters))

    def _state_shardings(self) -> TrainState:
        """Returns the shardings of the state: moments lie as their parameters do."""
        shapes = jax.eval_shape(lambda: self._initial_state(0))
        of_parameters = variable_shardings(shapes.parameters, self.mesh)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        return TrainState(
            step=replicated,
            parameters=of_parameters,
            optimizer_state=optax.tree.map_params(
                self.optimizer,
                lambda _, sharding: sharding,
                shapes.optimizer_state,
                of_parameters,
                transform_non_params=lambda _: replicated,
                is_leaf=lambda node: isinstance(node, nnx.Variable),
            ),
        )

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss(parameters: nnx.State):
            return joint_loss(self.model(parameters), batch, self.loss_config)

        (_, parts), gradient = jax.value_and_grad(loss, has_aux=True)(state.parameters)
        updates, optimizer_state = self.optimizer.update(
            gradient, state.optimizer_state, state.parameters
        )
        parameters = optax.apply_updates(state.parameters, updates)
        metrics = {**parts, "gradient_norm": optax.tree.norm(gradient)}
        return TrainState(state.step + 1, parameters, optimizer_state), metrics


def check_model_fits_mesh(config: MistralConfig, mesh: Mesh) -> None:
    """Checks that every axis of the model that the mesh splits can be split so.

    Raises:
      MeshError: one cannot; the message names the model's field and the mesh's.
    """
    split_by = {
        "hidden_size": "fsdp",
        "num_attention_heads": "tensor",
        "num_key_value_heads": "tensor",
        "intermediate_size": "tensor",
        "vocab_size": "tensor",
        "num_local_experts": "expert",
    }
    for field, axis in split_by.items():
        size, ways = getattr(config, field, 1 if axis == "expert" else None), mesh.shape[axis]
        if size % ways:
            raise MeshError(
                f"config.mesh.{axis}={ways} does not divide config.model {field}={size}"
            )
