"""The grit-jax side of `train_step.py`: the joint step on packed rows, and a profile of it."""

from collections.abc import Callable
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from step_work import TEMPERATURE, Setting, StepTexts, pack_steps

from grit_jax.models import ModelConfig
from grit_jax.sharding import make_mesh
from grit_jax.training.flops import peak_flops, useful_flops
from grit_jax.training.joint_loss import LossConfig, make_joint_loss
from grit_jax.training.optimizer import make_optimizer
from grit_jax.training.train_step import Trainer

# Minimum memory for training 7B in bfloat16 with a float32 second moment: 72 GB (2 bytes per
# parameter for parameters, gradient and first moment, 4 for the second), and activations.
MEMORY_FOR_FLOAT32_MOMENT = 110e9
MATMUL_SIZE = 3072


class JaxSide:
    """Takes steps with grit-jax, with cuDNN attention on a GPU."""

    def __init__(self, setting: Setting, cases: dict[str, list[StepTexts]]):
        device = jax.devices()[0]
        on_gpu = device.platform == "gpu"
        config = ModelConfig(
            **setting.sizes,
            dtype=setting.dtype,
            param_dtype=setting.dtype,
            remat=setting.remat,
            attention_implementation="cudnn" if on_gpu else "auto",
        )
        optimizer = _optimizer(setting, device)
        mesh = make_mesh(devices=[device])
        loss = make_joint_loss(LossConfig(temperature=TEMPERATURE))
        self.trainer = Trainer(config, loss, optimizer, mesh)
        self.state = self.trainer.initial_state(0)
        self._packed = {case: pack_steps(steps) for case, steps in cases.items()}

    def step(self, case: str, number: int) -> dict[str, float]:
        """Takes a step on a case's texts of this index; returns its seconds and losses."""
        batch = self._to_devices(case, number)
        with jax.set_mesh(self.trainer.mesh):
            start = time.perf_counter()
            self.state, metrics = jax.block_until_ready(self.trainer.step(self.state, batch))
            seconds = time.perf_counter() - start
        losses = {name: float(metrics[name]) for name in ("embedding_loss", "generative_loss")}
        return {"seconds": seconds, **losses}

    def peak_memory(self) -> float | None:
        """Returns the peak memory of the device in bytes, or None if it is unknown."""
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    def useful_flops(self, case: str, number: int) -> float:
        """Returns the useful operations of a step (see `grit_jax.training.flops`)."""
        batch = self._packed[case][number]
        return useful_flops(self.trainer.model_config, batch, causal_streams={"chat"})

    def peak_flops(self) -> float | None:
        """Returns the peak operations per second of the device, or None if it is unknown."""
        return peak_flops(jax.devices()[:1])

    def tensors(self) -> dict[str, np.ndarray]:
        """Returns the parameters as Hugging Face tensors, by name."""
        from grit_jax.conversion.layout import parameters

        ours = nnx.to_pure_dict(self.state.parameters)
        tensors = {}
        for parameter in parameters(self.trainer.model_config):
            stacked: Any = ours
            for key in parameter.path:
                stacked = stacked[key]
            for index, name in parameter.tensors():
                tensors[name] = parameter.to_tensor(np.asarray(stacked[index]))
        return tensors

    def profile(self, case: str) -> dict[str, float]:
        """Returns the operations, bytes and seconds of a step and of its parts."""
        batch = self._to_devices(case, 0)
        trainer = self.trainer

        def loss(trained: Any, batch: Any) -> Any:
            model = trainer.model(trained["model"])
            return trainer.loss.value(model, trained["loss"], batch)

        def update(state: Any, gradient: Any) -> Any:
            return trainer.optimizer.update(gradient, state.optimizer_state, state.trained)

        with jax.set_mesh(trainer.mesh):
            step = trainer.step.lower(self.state, batch).compile()
            cost: Any = step.cost_analysis()
            found = {
                "useful FLOPs": self.useful_flops(case, 0),
                "FLOPs of products": product_flops(jax.make_jaxpr(trainer.step)(self.state, batch)),
                "XLA's FLOPs": cost["flops"],
                "XLA's bytes": cost["bytes accessed"],
                "temporary bytes": step.memory_analysis().temp_size_in_bytes,
                "matmul FLOPs a second": matmul_rate(),
                "forward seconds": _median_seconds(jax.jit(loss), self.state.trained, batch),
            }
            both = jax.jit(jax.value_and_grad(loss, has_aux=True))
            found["gradient seconds"] = _median_seconds(both, self.state.trained, batch)
            of_update = (self.state, both(self.state.trained, batch)[1])
            found["optimizer seconds"] = _median_seconds(jax.jit(update), *of_update)
            del of_update
        found["step seconds"] = float(
            np.median([self.step(case, 0)["seconds"] for _ in range(3)][1:])
        )
        return found

    def _to_devices(self, case: str, number: int) -> Any:
        return self.trainer.to_devices(self._packed[case][number])


def _optimizer(setting: Setting, device: jax.Device) -> optax.GradientTransformation:
    """Returns AdamW as in training, or all in bfloat16 if its second moment does not fit."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if setting.sizes["hidden_size"] >= 4096 and limit and limit < MEMORY_FOR_FLOAT32_MOMENT:
        adamw = optax.adamw(setting.learning_rate, weight_decay=0.0)
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)
    return make_optimizer(
        optax.constant_schedule(setting.learning_rate),
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        embedding_lr_multiplier=1.0,
        mu_dtype=setting.dtype,
    )


def matmul_rate() -> float:
    """Returns the operations per second of a large float32 matrix product, the best of five."""
    matrix = jnp.ones((MATMUL_SIZE, MATMUL_SIZE))
    square = jax.jit(lambda matrix: matrix @ matrix)
    seconds = [_seconds(square, matrix) for _ in range(6)]
    return 2 * MATMUL_SIZE**3 / min(seconds[1:])


def _median_seconds(function: Callable, *arguments: Any) -> float:
    return float(np.median([_seconds(function, *arguments) for _ in range(3)][1:]))


def _seconds(function: Callable, *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def product_flops(program: Any) -> float:
    """Returns the operations of all matrix products in a jaxpr, including repetitions in loops.

    Only the largest branch of a condition counts.
    """
    total = 0.0
    for equation in program.eqns:
        inner = [product_flops(each) for each in _programs_in(equation.params)]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * equation.outvars[0].aval.size * np.prod([left[i] for i in contracted])
        elif equation.primitive.name == "cond":
            total += max(inner)
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return float(total)


def _programs_in(parameters: dict[str, Any]) -> list[Any]:
    values = [
        value
        for given in parameters.values()
        for value in (given if isinstance(given, tuple | list) else [given])
    ]
    return [getattr(value, "jaxpr", value) for value in values if _is_program(value)]


def _is_program(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")
