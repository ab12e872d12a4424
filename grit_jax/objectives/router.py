"""The load-balancing loss of a mixture of experts.

Dimensions: L layers, C experts chosen for a token, E experts.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def load_balancing_loss(
    choices: Float[Array, "L C E"], probabilities: Float[Array, "L E"], tokens: Float[Array, " L"]
) -> Float[Array, ""]:
    """The auxiliary loss of Switch Transformer (arXiv 2101.03961), as transformers computes it.

    Args:
      choices: number of tokens that chose each expert as their first, second, ... choice.
      probabilities: sum over tokens of the router's probability of each expert.
      tokens: number of tokens.

    Returns:
      E times the sum over experts of (share of choices x mean probability), which is C if all
      experts are chosen equally often.
    """
    total = jnp.maximum(jnp.sum(tokens), 1.0)
    share = jnp.sum(choices, axis=(0, 1)) / total
    probability = jnp.sum(probabilities, axis=0) / total
    return choices.shape[-1] * jnp.sum(share * probability)
