"""Mixtral (arXiv 2401.04088): a Mistral whose feed-forward network is a choice among experts.

Legend of dimensions: M tokens, D hidden, F feed-forward, E experts,
C experts chosen for a token.
"""

from collections.abc import Collection, Mapping
import dataclasses
import functools
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grit_jax.models.experts import EXPERT_UP_AXES, EXPERT_DOWN_AXES, apply_experts
from grit_jax.models.layers import fan_in_std, residual_std, parameter
from grit_jax.models.linear import LinearLayers, linear
from grit_jax.models.decoder import Decoder, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(ModelConfig):
    """Sizes of a Mixtral, under the names of Hugging Face's config.json; the defaults are 8x7B's.

    Raises:
      ValueError: a size is impossible; the message names it.
    """

    rope_theta: float = 1e6
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.02

    linear_layers: ClassVar[Mapping[str, int]] = {
        **ModelConfig.linear_layers,
        "feed_forward.router": 1,
    }
    may_be_zero: ClassVar[Collection[str]] = ("router_aux_loss_coef",)

    def __post_init__(self):
        super().__post_init__()
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"config.model.num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_local_experts={self.num_local_experts}"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterStatistics:
    """Sums over the tokens of a stream that the load-balancing loss is made of.

    Attributes:
      choices: how many tokens chose each expert as their first, second, ... choice.
      probabilities: sum of the probabilities given to each expert.
      tokens: number of tokens; padding does not count.
    """

    choices: Float[Array, "*L C E"]
    probabilities: Float[Array, "*L E"]
    tokens: Float[Array, "*L"]


class Experts(LinearLayers):
    """Dropless mixture of gated feed-forward networks: every token reaches all its experts."""

    def __init__(self, config: MixtralConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, F, E = config.hidden_size, config.intermediate_size, config.num_local_experts
        weight = functools.partial(parameter, rngs, config)
        self.router = weight((D, E), ("embed", "router"), fan_in_std(D))
        self.gate = weight((E, D, F), EXPERT_UP_AXES, fan_in_std(D))
        self.up = weight((E, D, F), EXPERT_UP_AXES, fan_in_std(D))
        self.down = weight((E, F, D), EXPERT_DOWN_AXES, residual_std(F, config))
        self.adapt("feed_forward", rngs=rngs)

    def __call__(
        self, hidden: Float[Array, "M D"], is_token: Bool[Array, " M"]
    ) -> tuple[Float[Array, "M D"], RouterStatistics]:
        """Returns the transformed states, and what the load-balancing loss needs of the router.

        Padding goes to no expert: its transformed state is 0.
        """
        probabilities = self._probabilities(hidden)
        weights, experts = jax.lax.top_k(probabilities, self.config.num_experts_per_tok)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        none = self.config.num_local_experts
        output = apply_experts(
            hidden,
            weights.astype(self.config.dtype),
            jnp.where(is_token[:, None], experts, none),
            self.weight("gate"),
            self.weight("up"),
            self.weight("down"),
        )
        return output, router_statistics(probabilities, experts, is_token)

    def _probabilities(self, hidden: Float[Array, "M D"]) -> Float[Array, "M E"]:
        wide, router = hidden.astype(jnp.float32), self.weight("router", "float32")
        return jax.nn.softmax(linear(wide, router))


def router_statistics(
    probabilities: Float[Array, "M E"], experts: Int[Array, "M C"], is_token: Bool[Array, " M"]
) -> RouterStatistics:
    """Returns the sums that the load-balancing loss is made of, over the tokens that are real."""
    real = is_token.astype(jnp.float32)
    chosen = jax.nn.one_hot(experts, probabilities.shape[-1], dtype=jnp.float32)
    return RouterStatistics(
        choices=jnp.einsum("MCE,M->CE", chosen, real),
        probabilities=jnp.einsum("ME,M->E", probabilities, real),
        tokens=jnp.sum(real),
    )


class Mixtral(Decoder):
    """A Mistral with experts; `run` returns their `RouterStatistics` for each stream."""

    feed_forward = Experts
