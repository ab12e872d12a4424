"""AdamW with the schedules of GritLM; a step whose gradient is not finite changes nothing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("linear", "cosine", "constant")

# Keys in the tree of trained parameters.
TOKEN_EMBEDDING = "model/embedding"
LOSS_PARAMETERS = "loss"


def learning_rate_schedule(
    learning_rate: float, warmup_ratio: float, steps: int, schedule: str = "linear"
) -> optax.Schedule:
    """Returns linear warm-up to `learning_rate`, then a decay to 0 at `steps`.

    Args:
      learning_rate: the highest.
      warmup_ratio: share of the steps that the warm-up takes.
      steps: of the run.
      schedule: how it decays: "linear", "cosine", or "constant" (it does not).

    Raises:
      ValueError: the schedule is unknown.
    """
    warmup_steps = int(warmup_ratio * steps)
    left = max(steps - warmup_steps, 1)
    decays = {
        "linear": optax.schedules.linear_schedule(learning_rate, 0.0, left),
        "cosine": optax.schedules.cosine_decay_schedule(learning_rate, left),
        "constant": optax.schedules.constant_schedule(learning_rate),
    }
    if schedule not in decays:
        raise ValueError(
            f"config.optimizer.schedule={schedule!r} must be one of {', '.join(SCHEDULES)}"
        )
    warmup = optax.schedules.linear_schedule(0.0, learning_rate, max(warmup_steps, 1))
    return optax.schedules.join_schedules([warmup, decays[schedule]], [warmup_steps])


def make_optimizer(
    schedule: optax.Schedule,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    max_grad_norm: float,
    embedding_lr_multiplier: float,
    mu_dtype: str,
) -> optax.GradientTransformation:
    """Returns AdamW (arXiv 1711.05101) behind a clip of the gradient's global norm.

    It moves a tree with the keys "model" and "loss", what the loss itself learns; only the model's
    weights decay. The token embeddings move by `embedding_lr_multiplier` times the schedule's rate.
    Adam's updates are about a learning rate large whatever the parameter's size, and from random
    weights the embeddings are far larger than the layers' matrices (as in arXiv 2203.03466).

    A gradient that is not finite changes neither parameters nor moments, and is counted.

    `mu_dtype` is the type of the first moment. The second is in float32 whatever the
    parameters are: it changes by a thousandth at a time, which bfloat16 would round away.
    """
    adamw = optax.adamw(
        schedule,
        b1=beta1,
        b2=beta2,
        eps=epsilon,
        weight_decay=weight_decay,
        mu_dtype=mu_dtype,
        mask=_is_of_model,
    )
    chain = optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        adamw,
        optax.masked(optax.scale(embedding_lr_multiplier), _is_token_embedding),
    )
    # Never to give up and take such a gradient all the same: who trains decides when to stop.
    return optax.apply_if_finite(_in_float32(chain), jnp.iinfo(jnp.int32).max)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `inner` as it would be if gradients and parameters were of type float32."""

    def init(params: Any) -> Any:
        return inner.init(optax.tree.cast(params, jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide: Any = optax.tree.cast((updates, params), jnp.float32)
        updates, state = inner.update(wide[0], state, wide[1])
        # Of the type of a step that is skipped: optax takes either in one program.
        narrow: Any = optax.tree.cast_like(updates, params)
        return narrow, state

    return optax.GradientTransformation(init, update)


def _is_token_embedding(parameters: Any) -> Any:
    return _by_key(parameters, lambda key: key.startswith(f"{TOKEN_EMBEDDING}/"))


def _is_of_model(parameters: Any) -> Any:
    return _by_key(parameters, lambda key: not key.startswith(f"{LOSS_PARAMETERS}/"))


def _by_key(parameters: Any, predicate: Callable[[str], bool]) -> Any:
    def of_leaf(path: Any, _: Any) -> bool:
        return predicate(f"{jax.tree_util.keystr(path, simple=True, separator='/')}/")

    return jax.tree.map_with_path(of_leaf, parameters)
