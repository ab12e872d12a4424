"""AdamW with a learning rate schedule, which skips steps whose gradient is not finite."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("linear", "cosine", "constant")

# Paths in the tree of trained parameters.
TOKEN_EMBEDDING = "model/embedding"
LOSS_PARAMETERS = "loss"


def learning_rate_schedule(
    learning_rate: float, warmup_ratio: float, steps: int, schedule: str = "linear"
) -> optax.Schedule:
    """Returns a linear warm-up to `learning_rate`, followed by a decay to 0 at `steps`.

    Args:
      learning_rate: the peak learning rate.
      warmup_ratio: fraction of the steps that are warm-up.
      steps: number of steps of the run.
      schedule: the decay: "linear", "cosine", or "constant" for none.

    Raises:
      ValueError: the schedule is unknown.
    """
    warmup_steps = int(warmup_ratio * steps)
    decay_steps = max(steps - warmup_steps, 1)
    decays = {
        "linear": optax.schedules.linear_schedule(learning_rate, 0.0, decay_steps),
        "cosine": optax.schedules.cosine_decay_schedule(learning_rate, decay_steps),
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
    """Returns AdamW (arXiv 1711.05101) with clipping of the gradient's global norm.

    It updates a tree with the keys "model" and "loss" (the loss's own parameters). A gradient that
    is not finite changes neither parameters nor moments, and is counted.

    Args:
      schedule: learning rate by step.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      epsilon: added to the square root of the second moment.
      weight_decay: weight decay of the model's parameters; the loss's parameters do not decay.
      max_grad_norm: maximum global norm of the gradient.
      embedding_lr_multiplier: learning rate of the token embeddings, relative to the schedule.
        Adam's updates are about as large as the learning rate, whatever the parameter's scale, and
        randomly initialized embeddings are far larger than the layers' matrices (see arXiv
        2203.03466).
      mu_dtype: dtype of the first moment. The second moment is float32 whatever the dtype of the
        parameters: it changes by a thousandth per step, which bfloat16 would round away.
    """
    adamw = optax.adamw(
        schedule,
        b1=beta1,
        b2=beta2,
        eps=epsilon,
        weight_decay=weight_decay,
        mu_dtype=mu_dtype,
        mask=_is_model_parameter,
    )
    chain = optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        adamw,
        optax.masked(optax.scale(embedding_lr_multiplier), _is_token_embedding),
    )
    # Never apply a gradient that is not finite, however many are consecutive: `SkipGuard` stops the
    # run.
    return optax.apply_if_finite(_in_float32(chain), jnp.iinfo(jnp.int32).max)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps `inner` to compute in float32, whatever the dtype of gradients and parameters."""

    def init(params: Any) -> Any:
        return inner.init(optax.tree.cast(params, jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide: Any = optax.tree.cast((updates, params), jnp.float32)
        updates, state = inner.update(wide[0], state, wide[1])
        # A skipped step returns updates of the parameters' dtype; both branches must agree.
        narrow: Any = optax.tree.cast_like(updates, params)
        return narrow, state

    return optax.GradientTransformation(init, update)


def _is_token_embedding(parameters: Any) -> Any:
    return _map_keys(parameters, lambda key: key.startswith(f"{TOKEN_EMBEDDING}/"))


def _is_model_parameter(parameters: Any) -> Any:
    return _map_keys(parameters, lambda key: not key.startswith(f"{LOSS_PARAMETERS}/"))


def _map_keys(parameters: Any, predicate: Callable[[str], bool]) -> Any:
    """Returns a tree with the result of `predicate` for the path of each parameter."""

    def of_leaf(path: Any, _: Any) -> bool:
        return predicate(f"{jax.tree_util.keystr(path, simple=True, separator='/')}/")

    return jax.tree.map_with_path(of_leaf, parameters)
