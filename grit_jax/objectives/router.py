"""The load-balancing loss of Mixtral's router.

Legend of dimensions: L layers, C choices, E experts.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def load_balancing_loss(
    choices: Float[Array, "L C E"], probabilities: Float[Array, "L E"], tokens: Float[Array, " L"]
) -> Float[Array, ""]:
    """Switch Transformer's auxiliary loss (arXiv 2101.03961), as Hugging Face's Mixtral takes it.

    Args:
      choices: how many tokens chose each expert as their first, second, ... choice.
      probabilities: sum over tokens of the probability given to each expert.
      tokens: number of tokens.

    Returns:
      E times the sum over experts of (share of choices x mean probability); C at perfect balance.
    """
    total = jnp.maximum(jnp.sum(tokens), 1.0)
    share = jnp.sum(choices, axis=(0, 1)) / total
    probability = jnp.sum(probabilities, axis=0) / total
    return choices.shape[-1] * jnp.sum(share * probability)
