"""What a training step needs on a TPU topology, asked of the TPU's own compiler.

The step is the one that training makes: the same program, shardings and kernels. How fast it can
be at most follows from what it does (`program`) and what the chips can do (`chips`): the slowest of
matrix products, main memory, links and network, as if each ran beside the others all the time.
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

# The longest text of a run, in parts of the longest row that is allowed.
LONGEST_TEXT = 0.8
# What the compiler says of a program that does not fit.
TOO_LARGE = re.compile(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm")
UNITS = {"K": 2**10, "M": 2**20, "G": GIB}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A step on a topology; bytes and operations are those of one chip, but for `flops_per_step`.

    Attributes:
      topology: its name.
      num_chips: in all slices.
      mesh: sizes of its axes.
      remat: `config.model.remat`.
      grad_cache_chunks: `config.grad_cache_chunks`.
      rows: number and length of each stream's rows.
      tokens_per_step: real tokens.
      fits: whether the compiler finds room for it.
      hbm_bytes_per_chip: main memory that it takes.
      hbm_limit_bytes_per_chip: main memory that there is.
      parameter_bytes_per_chip: of that, parameters.
      optimizer_bytes_per_chip: of that, the optimizer's state.
      compile_seconds: what compiling took here.
      flops_per_step: operations of all chips; 0 where the step does not fit, as what follows.
      hbm_traffic_bytes_per_chip: bytes read from and written to main memory.
      ici_seconds: what each chip's links are in use for.
      dcn_seconds: what the network between slices is in use for.
      compute_seconds: what the matrix products take at the chip's peak.
      hbm_seconds: what the traffic takes.
      step_seconds_bound: the largest of the four.
      mfu_bound: useful operations a second, by the rule of `flops`, in parts of the peak.
      collectives: kind, bytes, devices and how often, the costliest first.
    """

    topology: str
    num_chips: int
    mesh: dict[str, int]
    remat: str
    grad_cache_chunks: int
    rows: dict[str, str]
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
    mfu_bound: float = 0.0
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def make_plan(config: Config, topology: Topology, tokens: dict[str, int]) -> Plan:
    """Compiles the step of a configuration for a topology and returns what it takes.

    Of the weights that a run starts from, the sizes are read, and nothing else.

    Args:
      config: the configuration.
      topology: the chips.
      tokens: of a text on average, by stream ("query", "passage", "chat").

    Raises:
      ConfigError, MeshError: the configuration does not fit the chips; the message names the field.
      BucketError: the weights are in a bucket that cannot be used.
    """
    trainer = make_trainer(config, open_pretrained(config), topology.devices)
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
        "tokens_per_step": count_tokens(batch),
        "hbm_limit_bytes_per_chip": topology.chip.hbm_bytes,
        "parameter_bytes_per_chip": _bytes_per_chip((state.parameters, state.frozen)),
        "optimizer_bytes_per_chip": _bytes_per_chip(state.optimizer_state),
        "compile_seconds": time.perf_counter() - started,
        "hbm_bytes_per_chip": used,
    }
    if compiled is None:
        return Plan(fits=False, **common)
    work = program_cost(compiled.as_text(), len(topology.devices), _rows_used(trainer))
    useful = useful_flops(trainer.model_config, batch, causal_streams(trainer.loss, batch))
    fits = used <= topology.chip.hbm_bytes
    return Plan(fits=fits, **common, **_speed(work, useful, topology, trainer))


def search(config: Config, topology: Topology, tokens: dict[str, int]) -> Iterator[Plan]:
    """Yields the plans of other meshes, remat policies and numbers of GradCache's chunks.

    For each mesh and policy, the fewest chunks that fit are sought, among powers of two.

    Raises:
      ConfigError, BucketError: see `make_plan`.
      MeshError: none of the meshes can be laid over the chips, or divides the model.
    """
    problem, is_tried = None, False
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
                except MeshError as error:  # One that does not divide the model.
                    problem = problem or error
                    break
                is_tried = True
                yield plan
                if plan.fits or _state_alone_is_too_large(plan):
                    break
                chunks *= 2
    if problem is not None and not is_tried:
        raise problem


def fastest(plans: list[Plan]) -> Plan | None:
    """Returns the plan that fits and is bound to be the fastest, None if none fits."""
    fitting = [plan for plan in plans if plan.fits]
    return min(fitting, key=lambda plan: plan.step_seconds_bound, default=None)


def typical_batch(config: Config, trainer: Trainer, tokens: dict[str, int]) -> Batch:
    """Returns a batch in the rows that a run would choose for it.

    Its texts have between half of the average length and half as much again. The longest of the
    run are longer: rows have room for them.

    Raises:
      ConfigError: a text of that length does not fit a row.
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
        lengths = np.rint(np.linspace(mean / 2, 3 * mean / 2, counts[stream])).astype(int)
        if lengths[-1] > longest:
            raise ConfigError(
                f"config.data.{stream}_row_length={longest} is below the {lengths[-1]} tokens of "
                f"the longest {stream}, where they have {mean} on average"
            )
        longest_of_run = max(int(lengths[-1]), int(longest * LONGEST_TEXT))
        rows = best_rows([lengths], limits.lengths(stream, longest_of_run), limits)
        places = fit_rows(lengths, rows.count, rows.length)
        assert places is not None, "the rows were chosen for these texts"
        made = [Text(np.ones(length, np.int32), np.ones(length, bool)) for length in lengths]
        return pack(made, places, rows.count, rows.length)

    parts = {}
    if config.mode in ("unified", "embedding"):
        positives = np.arange(0, counts["passage"], data.group_size, dtype=np.int32)
        contents = np.arange(counts["passage"], dtype=np.int32)
        parts["embedding"] = EmbeddingBatch(texts("query"), texts("passage"), positives, contents)
    if config.mode in ("unified", "generative"):
        parts["generative"] = ChatBatch(texts("chat"))
    return Batch(parts)


def _compile(trainer: Trainer, batch: Batch) -> tuple[Any, float]:
    """Returns the compiled step, None if it does not fit, and the main memory that it takes."""
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), batch)
    with jax.set_mesh(trainer.mesh):
        try:
            lowered = trainer.step.lower(trainer.abstract_state(), shapes)
        except AttentionError as error:
            raise ConfigError(str(error)) from None
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not (said := TOO_LARGE.search(str(error))):
                raise
            return None, float(said.group(1)) * UNITS[said.group(2)]
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


def _rows_used(trainer: Trainer) -> float:
    """Returns the part of the room for rows at the experts that is used where all are chosen alike.

    There is room for all choices of all devices along the axis of the experts.
    """
    model, ways = trainer.model_config, trainer.mesh.shape["expert"]
    if not model.has_experts or ways == 1:
        return 1.0
    chosen = model.num_experts_per_tok
    return chosen / (ways * min(chosen, model.num_local_experts // ways))


def _state_alone_is_too_large(plan: Plan) -> bool:
    """Returns whether no number of chunks makes it fit."""
    state = plan.parameter_bytes_per_chip + plan.optimizer_bytes_per_chip
    return state > plan.hbm_limit_bytes_per_chip


def _speed(
    work: ProgramCost, useful: float, topology: Topology, trainer: Trainer
) -> dict[str, Any]:
    chip, num_chips = topology.chip, len(topology.devices)
    peak = peak_flops(topology.devices)
    assert peak is not None, "the peak of every chip that can be planned for is known"
    devices = list(trainer.mesh.devices.flat)
    times: list[tuple[float, float, Collective, int]] = []
    for collective, count in work.collectives.items():
        links, network = _seconds(collective, devices, topology)
        times.append((count * links, count * network, collective, count))
    seconds = {
        "compute_seconds": work.flops * num_chips / peak,
        "hbm_seconds": work.hbm_bytes / chip.hbm_bandwidth,
        "ici_seconds": sum(links for links, *_ in times),
        "dcn_seconds": sum(network for _, network, *_ in times),
    }
    bound = max(seconds.values())
    times.sort(key=lambda each: -each[0] - each[1])
    return {
        **seconds,
        "flops_per_step": work.flops * num_chips,
        "hbm_traffic_bytes_per_chip": work.hbm_bytes,
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


def _seconds(collective: Collective, devices: list[Any], topology: Topology) -> tuple[float, float]:
    """Returns for how long a collective keeps each chip's links, and the network, at least.

    Chips of a slice send along all dimensions that their group spans, both ways.
    """
    chip = topology.chip
    if collective.kind == "send":
        return 0.0, collective.num_bytes / chip.network_bandwidth
    if collective.kind == "collective-permute":
        return collective.num_bytes / chip.link_bandwidth, 0.0
    group = [devices[number] for number in collective.group]
    there_and_back = 2 if collective.kind == "all-reduce" else 1
    moved = there_and_back * collective.num_bytes * (1 - 1 / len(group))
    return moved / (2 * chip.link_bandwidth * max(dimensions_spanned(group), 1)), 0.0
