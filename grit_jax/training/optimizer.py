"""AdamW with the schedule of GritLM."""

from typing import Any

import jax
import optax


def learning_rate_schedule(learning_rate: float, warmup_fraction: float, steps: int):
    """Returns linear warm-up to `learning_rate`, then linear decay to 0 at `steps`."""
    warmup_steps = int(warmup_fraction * steps)
    return optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(0.0, learning_rate, max(warmup_steps, 1)),
            optax.schedules.linear_schedule(learning_rate, 0.0, max(steps - warmup_steps, 1)),
        ],
        [warmup_steps],
    )


def make_optimizer(
    schedule: optax.Schedule,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    clip_norm: float,
    token_embedding_factor: float,
) -> optax.GradientTransformation:
    """Returns AdamW (arXiv 1711.05101) behind a clip of the gradient's global norm.

    The token embeddings move by `token_embedding_factor` times the schedule's rate. Adam's updates
    are about a learning rate large whatever the parameter's size, and from random weights the
    embeddings are far larger than the layers' matrices (as in arXiv 2203.03466).
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay),
        optax.masked(optax.scale(token_embedding_factor), _is_token_embedding),
    )


def _is_token_embedding(parameters: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[:1], simple=True) == "embedding", parameters
    )
