"""Rematerialisation: what a layer's backward pass finds saved; the rest it computes again.

From the fastest to the one that needs the least memory on the device.
"""

from typing import Any

import jax

from grit_jax.models.experts import EXPERT_PRODUCTS

# The kind of memory beside a device that activations are offloaded to.
HOST_MEMORY = "pinned_host"

_SAVE_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_OFFLOAD_DOTS = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", HOST_MEMORY)
# The products of experts are in loops or kernels, where only their names tell them.
_SAVE_EXPERTS = jax.checkpoint_policies.save_only_these_names(*EXPERT_PRODUCTS)
_OFFLOAD_EXPERTS = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=(),
    names_which_can_be_offloaded=EXPERT_PRODUCTS,
    offload_src="device",
    offload_dst=HOST_MEMORY,
)


def _save_matmuls(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    """Saves products with weights; those of attention's scores, which are larger, are not."""
    return _SAVE_DOTS(primitive, *arguments, **parameters) or _SAVE_EXPERTS(
        primitive, *arguments, **parameters
    )


def _offload_matmuls(primitive: Any, *arguments: Any, **parameters: Any) -> Any:
    """Moves to the host's memory what `_save_matmuls` saves."""
    is_of_experts = _SAVE_EXPERTS(primitive, *arguments, **parameters)
    offload = _OFFLOAD_EXPERTS if is_of_experts else _OFFLOAD_DOTS
    return offload(primitive, *arguments, **parameters)


REMAT_POLICIES = {
    # Nothing is computed again but what `layers` never saves: norms and gates. No policy, since one
    # that saves everything would save these too.
    "none": None,
    # The products with weights.
    "save_matmuls": _save_matmuls,
    # The same, in the memory of the host.
    "offload": _offload_matmuls,
    # The layer's input alone.
    "full": jax.checkpoint_policies.nothing_saveable,
}
