"""Rematerialization: what a layer saves for its backward pass. The rest is computed again.

The policies go from the fastest to the one that needs the least device memory.
"""

from typing import Any

import jax

from grit_jax.models.experts import EXPERT_PRODUCTS

# The kind of host memory that activations are offloaded to.
HOST_MEMORY = "pinned_host"

_SAVE_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_OFFLOAD_DOTS = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", HOST_MEMORY)
# The products of experts are inside loops or kernels, where a policy knows them by name only.
_SAVE_EXPERTS = jax.checkpoint_policies.save_only_these_names(*EXPERT_PRODUCTS)
_OFFLOAD_EXPERTS = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=(),
    names_which_can_be_offloaded=EXPERT_PRODUCTS,
    offload_src="device",
    offload_dst=HOST_MEMORY,
)


def _save_matmuls(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    """Saves products with weights, but not attention scores, which are larger."""
    return _SAVE_DOTS(primitive, *arguments, **parameters) or _SAVE_EXPERTS(
        primitive, *arguments, **parameters
    )


def _offload_matmuls(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    """Offloads to host memory what `_save_matmuls` saves."""
    is_of_experts = _SAVE_EXPERTS(primitive, *arguments, **parameters)
    offload = _OFFLOAD_EXPERTS if is_of_experts else _OFFLOAD_DOTS
    return offload(primitive, *arguments, **parameters)


# By the names of `config.REMAT_NAMES`.
REMAT_POLICIES = {
    # Saves everything but norms and activations, which `layers` always recomputes. A policy that
    # saves everything would save these too.
    "none": None,
    # Saves the products with weights.
    "save_matmuls": _save_matmuls,
    # Saves the same, in host memory.
    "offload": _offload_matmuls,
    # Saves only the layer's input.
    "full": jax.checkpoint_policies.nothing_saveable,
}
