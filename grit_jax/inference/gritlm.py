"""`GritLM`: one model that embeds and generates, as a user holds it."""

import dataclasses
import os

from flax import nnx
import jax
from jax.sharding import Mesh

from grit_jax.conversion import Model, open_model
from grit_jax.models import Mistral, make_model
from grit_jax.sharding import make_mesh, variable_shardings


class GritLM:
    """A model on the devices.

    Attributes:
      model: the Flax module: token ids to hidden states, hidden states to logits.
      mesh: the devices that its parameters lie on.
    """

    def __init__(self, model: Mistral, mesh: Mesh):
        self.model = model
        self.mesh = mesh

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        dtype: str = "bfloat16",
        mesh: Mesh | None = None,
        base: str | os.PathLike | None = None,
    ) -> "GritLM":
        """Returns the model at `path`, its parameters read straight to where they belong.

        Args:
          path: a Hugging Face folder, a checkpoint, or a run's folder (of which the newest
            checkpoint is taken); the latter two may be in a bucket, gs://BUCKET/FOLDER. Low-rank
            updates are added to the weights that they are of.
          dtype: "bfloat16" or "float32", of the parameters and of the computation.
          mesh: the devices, by default all of them.
          base: where the model of low-rank updates lies now, if it has moved.

        Raises:
          ConversionError: there is no model at `path`, or it is damaged.
          BucketError: its bucket cannot be used.
          ValueError: the type is unknown.
        """
        mesh = make_mesh() if mesh is None else mesh
        return cls(load_module(open_model(path, base=base), dtype, mesh), mesh)


def load_module(stored: Model, dtype: str, mesh: Mesh) -> Mistral:
    """Returns the Flax module of a stored model, laid out on a mesh by the table of shardings."""
    config = dataclasses.replace(stored.config, dtype=dtype, param_dtype=dtype)
    abstract = nnx.eval_shape(lambda: make_model(config, 0))
    graph, state = nnx.split(abstract)
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        variable_shardings(state, mesh),
    )
    nnx.replace_by_pure_dict(state, stored.load(nnx.to_pure_dict(shapes)))
    return nnx.merge(graph, state)
