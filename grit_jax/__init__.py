"""grit-jax: one decoder language model that embeds and generates, trained with JAX."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grit_jax.inference.gritlm import GritLM

__all__ = ["GritLM"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # JAX loads when it is needed: preparing data does without.
    if name != "GritLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from grit_jax.inference.gritlm import GritLM

    return GritLM
