"""Plans: the memory and a lower bound of the time of a training step on a TPU topology.

The training step itself is compiled with the TPU compiler: the same program, shardings and kernels.
The bound follows from the cost of the program (`program`) and the speed of the chips (`chips`). It
is the longest of the times for matrix products, main memory, links between chips and the network
between slices, as if all four overlapped perfectly.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import re
import time
from typing import Any

import jax
import numpy as np

from grit_jax.config import Config, ConfigError
from grit_jax.conversion.hub import is_hub_name
from grit_jax.data.batch import Batch, ChatBatch, EmbeddingBatch, PackedTexts
from grit_jax.data.packing import fit_rows, pack
from grit_jax.data.shapes import best_rows
from grit_jax.from_config import make_trainer, open_pretrained, row_limits
from grit_jax.models import AttentionError
from grit_jax.planning.chips import GIB, Topology, dimensions_spanned
from grit_jax.planning.program import Collective, ProgramCost, program_cost
from grit_jax.sharding import MeshError
from grit_jax.text.examples import Text
from grit_jax.training.flops import peak_flops, useful_flops
from grit_jax.training.loop import batch_rows, causal_streams, count_tokens
from grit_jax.training.train_step import Trainer

# Assumed length of a run's longest text, as a fraction of the maximum row length.
LONGEST_TEXT = 0.8
# The compiler's message about a program that does not fit in memory.
TOO_LARGE = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
UNITS = {"K": 2**10, "M": 2**20, "G": GIB}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The memory and the speed of a training step on a topology.

    If the step does not fit, every field from `flops_per_step` on is 0 or empty.

    Attributes:
      topology: the number of slices and the topology of a slice.
      num_chips: the number of chips in all slices.
      mesh: the size of each mesh axis.
      remat: `config.model.remat`.
      grad_cache_chunks: `config.grad_cache_chunks`.
      rows: the number and length of each stream's rows.
      tokens_per_text: the average tokens of a text of each stream that the plan is for.
      tokens_per_step: tokens in a step, without padding.
      fits: whether the step fits in the chips' main memory.
      hbm_bytes_per_chip: main memory that the step needs.
      hbm_limit_bytes_per_chip: main memory of a chip.
      parameter_bytes_per_chip: the parameters' share of `hbm_bytes_per_chip`.
      optimizer_bytes_per_chip: the optimizer state's share of `hbm_bytes_per_chip`.
      compile_seconds: how long the compilation took on this machine.
      flops_per_step: operations of all chips.
      hbm_traffic_bytes_per_chip: bytes read from and written to main memory.
      compute_seconds: time of the matrix products at peak speed.
      hbm_seconds: time of the memory traffic.
      ici_seconds: time that each chip's links to its neighbors are busy.
      dcn_seconds: time that the network between slices is busy.
      step_seconds_bound: the longest of the four times.
      steps: steps of the run, `config.steps`.
      chip_hours_bound: hours of all chips for those steps, at that bound.
      mfu_bound: model FLOPs utilization at that bound (`training.flops` defines useful operations).
      collectives: the kind, bytes, devices, count and times of each collective, the slowest first.
    """

    topology: str
    num_chips: int
    mesh: dict[str, int]
    remat: str
    grad_cache_chunks: int
    rows: dict[str, str]
    tokens_per_text: dict[str, int]
    tokens_per_step: int
    fits: bool
    hbm_bytes_per_chip: float
    hbm_limit_bytes_per_chip: float
    parameter_bytes_per_chip: float
    optimizer_bytes_per_chip: float
    compile_seconds: float
    flops_per_step: float = 0.0
    hbm_traffic_bytes_per_chip: float = 0.0
    compute_seconds: float = 0.0
    hbm_seconds: float = 0.0
    ici_seconds: float = 0.0
    dcn_seconds: float = 0.0
    step_seconds_bound: float = 0.0
    steps: int = 0
    chip_hours_bound: float = 0.0
    mfu_bound: float = 0.0
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def make_plan(config: Config, topology: Topology, tokens: dict[str, int]) -> Plan:
    """Compiles the training step of a configuration for a topology.

    Only the sizes of the weights that a run starts from are read.

    Args:
      config: the configuration.
      topology: the chips.
      tokens: the average tokens of a text of each stream ("query", "passage", "chat").

    Raises:
      ConfigError, MeshError: the configuration does not fit the topology.
      BucketError: the weights are in a bucket that cannot be read.
    """
    # Weights are not downloaded for a plan: a configuration that names them has their sizes.
    pretrained = None if is_hub_name(config.model.weights) else open_pretrained(config)
    trainer = make_trainer(config, pretrained, topology.devices)
    batch = typical_batch(config, trainer, tokens)
    started = time.perf_counter()
    compiled, used = _compile(trainer, batch)
    state = trainer.abstract_state()
    common: dict[str, Any] = {
        "topology": f"{topology.num_slices} x {topology.name}",
        "num_chips": len(topology.devices),
        "mesh": dict(trainer.mesh.shape),
        "remat": config.model.remat,
        "grad_cache_chunks": config.grad_cache_chunks,
        "rows": batch_rows(batch),
        "tokens_per_text": {stream: tokens[stream] for stream in batch_rows(batch)},
        "tokens_per_step": count_tokens(batch),
        "hbm_limit_bytes_per_chip": topology.chip.hbm_bytes,
        "parameter_bytes_per_chip": _bytes_per_chip((state.parameters, state.frozen)),
        "optimizer_bytes_per_chip": _bytes_per_chip(state.optimizer_state),
        "compile_seconds": time.perf_counter() - started,
        "hbm_bytes_per_chip": used,
    }
    if compiled is None:
        return Plan(fits=False, **common)
    cost = program_cost(compiled.as_text(), len(topology.devices), _expert_occupancy(trainer))
    useful = useful_flops(trainer.model_config, batch, causal_streams(trainer.loss, batch))
    fits = used <= topology.chip.hbm_bytes
    speed = _speed(cost, useful, topology, trainer)
    seconds = config.steps * speed["step_seconds_bound"]
    chip_hours = seconds * len(topology.devices) / 3600
    return Plan(fits=fits, **common, **speed, steps=config.steps, chip_hours_bound=chip_hours)


def search(config: Config, topology: Topology, tokens: dict[str, int]) -> Iterator[Plan]:
    """Tries meshes, remat policies and numbers of GradCache chunks, and yields their plans.

    For each mesh and policy, the number of chunks is doubled from 1 until the step fits.

    Args:
      config: the configuration; its mesh, remat policy and chunks are replaced.
      topology: see `make_plan`.
      tokens: see `make_plan`.

    Raises:
      ConfigError, BucketError: see `make_plan`.
      MeshError: no mesh fits both the topology and the model.
    """
    mesh_error, found_mesh = None, False
    for tensor in (1, 2, 4):
        for remat in ("save_matmuls", "full"):
            chunks = 1
            while chunks <= 64:
                tried = dataclasses.replace(
                    config,
                    mesh=dataclasses.replace(config.mesh, tensor=tensor, fsdp=-1),
                    model=dataclasses.replace(config.model, remat=remat),
                    grad_cache_chunks=chunks,
                )
                try:
                    plan = make_plan(tried, topology, tokens)
                except MeshError as error:  # This mesh does not divide the model.
                    mesh_error = mesh_error or error
                    break
                found_mesh = True
                yield plan
                if plan.fits or _state_is_too_large(plan):
                    break
                chunks *= 2
    if mesh_error is not None and not found_mesh:
        raise mesh_error


def fastest(plans: list[Plan]) -> Plan | None:
    """Returns the plan with the lowest bound among those that fit, or None."""
    fitting = [plan for plan in plans if plan.fits]
    return min(fitting, key=lambda plan: plan.step_seconds_bound, default=None)


def typical_batch(config: Config, trainer: Trainer, tokens: dict[str, int]) -> Batch:
    """Returns a batch of made-up texts, packed as a run would pack it.

    The lengths of the texts are spread evenly between 0.5 and 1.5 times the average, or less if the
    maximum row length leaves less room. Rows are long enough for the longest text of a run, which
    is assumed to be longer than those of the batch.

    Args:
      config: the configuration.
      trainer: its trainer.
      tokens: see `make_plan`.

    Raises:
      ConfigError: the average text does not fit in a row.
    """
    data = config.data
    counts = {
        "query": data.embedding_batch_size,
        "passage": data.embedding_batch_size * data.group_size,
        "chat": data.generative_batch_size,
    }
    limits = row_limits(config, trainer.mesh)

    def texts(stream: str) -> PackedTexts:
        mean, longest = tokens[stream], limits.longest[stream]
        if mean > longest:
            raise ConfigError(
                f"config.data.{stream}_row_length={longest} is below {mean}, the average tokens of "
                f"a {stream}: raise it, or lower --{stream}-tokens"
            )
        spread = min(mean / 2, longest - mean)
        lengths = np.rint(np.linspace(mean - spread, mean + spread, counts[stream])).astype(int)
        longest_in_run = max(int(lengths[-1]), int(longest * LONGEST_TEXT))
        rows = best_rows([lengths], limits.lengths(stream, longest_in_run), limits)
        assignment = fit_rows(lengths, rows.count, rows.length)
        assert assignment is not None, "the rows were chosen for these texts"
        made_up = [Text(np.ones(length, np.int32), np.ones(length, bool)) for length in lengths]
        return pack(made_up, assignment, rows.count, rows.length)

    parts = {}
    if config.mode != "generative":
        positives = np.arange(0, counts["passage"], data.group_size, dtype=np.int32)
        passage_ids = np.arange(counts["passage"], dtype=np.int32)
        query_ids = np.arange(counts["query"], dtype=np.int32)
        parts["embedding"] = EmbeddingBatch(
            texts("query"), texts("passage"), positives, passage_ids, query_ids
        )
    if config.mode != "embedding":
        parts["generative"] = ChatBatch(texts("chat"))
    return Batch(parts)


def _compile(trainer: Trainer, batch: Batch) -> tuple[Any, float]:
    """Returns the compiled step, or None if it does not fit, and the main memory it needs."""
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), batch)
    with jax.set_mesh(trainer.mesh):
        try:
            lowered = trainer.step.lower(trainer.abstract_state(), shapes)
        except AttentionError as error:
            raise ConfigError(str(error)) from None
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not (too_large := TOO_LARGE.search(str(error))):
                raise
            return None, float(too_large.group(1)) * UNITS[too_large.group(2)]
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    used += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return compiled, used + memory.generated_code_size_in_bytes


def _bytes_per_chip(state: Any) -> float:
    return float(
        sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(state)
        )
    )


def _expert_occupancy(trainer: Trainer) -> float:
    """Returns the fraction of the rows at each expert that hold a token, for a balanced router.

    Every device has as many rows as it would receive if all tokens chose its experts.
    """
    model, expert_devices = trainer.model_config, trainer.mesh.shape["expert"]
    if not model.has_experts or expert_devices == 1:
        return 1.0
    chosen = model.num_experts_per_tok
    return chosen / (expert_devices * min(chosen, model.num_local_experts // expert_devices))


def _state_is_too_large(plan: Plan) -> bool:
    """Returns whether the step does not fit with any number of chunks."""
    state = plan.parameter_bytes_per_chip + plan.optimizer_bytes_per_chip
    return state > plan.hbm_limit_bytes_per_chip


def _speed(
    cost: ProgramCost, useful: float, topology: Topology, trainer: Trainer
) -> dict[str, Any]:
    """Returns the fields of `Plan` that a step that does not fit lacks."""
    chip, num_chips = topology.chip, len(topology.devices)
    peak = peak_flops(topology.devices)
    assert peak is not None, "every chip in CHIPS has a known peak"
    devices = list(trainer.mesh.devices.flat)
    times: list[tuple[float, float, Collective, int]] = []
    for collective, count in cost.collectives.items():
        links, network = _collective_seconds(collective, devices, topology)
        times.append((count * links, count * network, collective, count))
    seconds = {
        "compute_seconds": cost.flops * num_chips / peak,
        "hbm_seconds": cost.hbm_bytes / chip.hbm_bandwidth,
        "ici_seconds": sum(links for links, *_ in times),
        "dcn_seconds": sum(network for _, network, *_ in times),
    }
    bound = max(seconds.values())
    times.sort(key=lambda each: -each[0] - each[1])
    return {
        **seconds,
        "flops_per_step": cost.flops * num_chips,
        "hbm_traffic_bytes_per_chip": cost.hbm_bytes,
        "step_seconds_bound": bound,
        "mfu_bound": useful / (bound * peak),
        "collectives": [
            {
                "kind": collective.kind,
                "bytes": collective.num_bytes,
                "devices": len(collective.group) or topology.num_slices,
                "times": count,
                "ici_seconds": links,
                "dcn_seconds": network,
            }
            for links, network, collective, count in times
        ],
    }


def _collective_seconds(
    collective: Collective, devices: list[Any], topology: Topology
) -> tuple[float, float]:
    """Returns the minimum times that a collective keeps each chip's links and the network busy.

    Chips of a slice send in both directions of every dimension that their group spans.
    """
    chip = topology.chip
    if collective.kind == "send":
        return 0.0, collective.num_bytes / chip.network_bandwidth
    if collective.kind == "collective-permute":
        return collective.num_bytes / chip.link_bandwidth, 0.0
    group = [devices[index] for index in collective.group]
    num_passes = 2 if collective.kind == "all-reduce" else 1  # Reduce-scatter, then all-gather.
    sent_bytes = num_passes * collective.num_bytes * (1 - 1 / len(group))
    return sent_bytes / (2 * chip.link_bandwidth * max(dimensions_spanned(group), 1)), 0.0
