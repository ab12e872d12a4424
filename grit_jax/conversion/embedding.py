"""How a model embeds, as it is said beside its sizes: its attention pattern and its pooling."""

from collections.abc import Mapping
from typing import Any

# The field of config.json that says it, which only grit-jax reads.
EMBEDDING = "grit"
DEFAULTS = {"attention": "bbcc", "pooling": "mean"}


def how_it_embeds(
    fields: Mapping[str, Any], attention: str | None = None, pooling: str | None = None
) -> dict[str, str]:
    """Returns the "attention" and the "pooling" of a model.

    Args:
      fields: the content of its config.json. One that does not say it has GritLM's.
      attention: in the place of the model's own.
      pooling: alike.
    """
    given = {"attention": attention, "pooling": pooling}
    given = {name: value for name, value in given.items() if value is not None}
    return DEFAULTS | fields.get(EMBEDDING, {}) | given
