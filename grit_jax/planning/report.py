"""Prints a plan as tables, and writes it as JSON."""

from collections.abc import Mapping
import dataclasses
import json

from rich.console import Console
from rich.table import Table

from grit_jax.planning.plan import GIB, Plan

# Collectives that the table lists.
MAX_COLLECTIVES = 8


def as_json(plan: Plan, sources: Mapping[str, str], price: float | None = None) -> str:
    """Returns the plan as a JSON object.

    Args:
      plan: the plan.
      sources: for each stream, where its average tokens per text are from.
      price: price of a chip-hour, to add the cost of the run.
    """
    fields = dataclasses.asdict(plan)
    fields["tokens_per_text_from"] = {stream: sources[stream] for stream in plan.tokens_per_text}
    if price is not None:
        fields["cost_bound"] = price * plan.chip_hours_bound
    return json.dumps(fields, indent=1)


def print_line(plan: Plan) -> None:
    """Prints a plan of `search` in one line."""
    print(_options(plan))
    print(f"  {_fit(plan)}" + (f"  {_speed(plan)}" if plan.fits else ""), flush=True)


def print_plan(plan: Plan, sources: Mapping[str, str], price: float | None = None) -> None:
    """Prints a plan as tables. For the arguments see `as_json`."""
    console = Console()
    table = Table(title=f"training step on {plan.topology}", show_header=False)
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    rows = ", ".join(f"{stream} {shape}" for stream, shape in plan.rows.items())
    table.add_row("mesh", mesh)
    texts = (f"{stream} {n} ({sources[stream]})" for stream, n in plan.tokens_per_text.items())
    table.add_row("tokens per text", ", ".join(texts))
    table.add_row("rows", f"{rows}: {plan.tokens_per_step:,} tokens")
    table.add_row("remat, chunks", f"{plan.remat}, {plan.grad_cache_chunks}")
    table.add_row("compile time", f"{plan.compile_seconds:.0f} s")
    table.add_row("memory per chip", _fit(plan))
    table.add_row("  parameters", _gib(plan.parameter_bytes_per_chip))
    table.add_row("  optimizer", _gib(plan.optimizer_bytes_per_chip))
    rest = plan.hbm_bytes_per_chip - plan.parameter_bytes_per_chip - plan.optimizer_bytes_per_chip
    table.add_row("  activations and other", _gib(rest))
    if plan.fits:
        table.add_row("matrix products", f"{plan.compute_seconds:.3f} s at peak speed")
        table.add_row("main memory (HBM)", f"{plan.hbm_seconds:.3f} s")
        table.add_row("links between chips (ICI)", f"{plan.ici_seconds:.3f} s")
        table.add_row("network between slices (DCN)", f"{plan.dcn_seconds:.3f} s")
        table.add_row("at best", _speed(plan))
        table.add_row(f"{plan.steps:,} steps at best", _run(plan, price))
    console.print(table)
    print(_options(plan))
    if plan.collectives:
        console.print(_collectives(plan))


def _collectives(plan: Plan) -> Table:
    table = Table(title="communication of a step, the slowest first")
    for column in ("kind", "MB", "chips", "times", "links s", "network s"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for collective in plan.collectives[:MAX_COLLECTIVES]:
        table.add_row(
            collective["kind"],
            f"{collective['bytes'] / 1e6:,.1f}",
            str(collective["devices"]),
            str(collective["times"]),
            f"{collective['ici_seconds']:.4f}",
            f"{collective['dcn_seconds']:.4f}",
        )
    return table


def _fit(plan: Plan) -> str:
    used, limit = plan.hbm_bytes_per_chip, plan.hbm_limit_bytes_per_chip
    verdict = "fits, with" if plan.fits else "does not fit, by"
    return f"{_gib(used)} of {_gib(limit)}: {verdict} {_gib(abs(limit - used))}"


def _speed(plan: Plan) -> str:
    tokens = plan.tokens_per_step / plan.step_seconds_bound
    return (
        f"{plan.step_seconds_bound:.3f} s a step, {tokens:,.0f} tokens/s, MFU {plan.mfu_bound:.1%}"
    )


def _run(plan: Plan, price: float | None) -> str:
    hours = plan.steps * plan.step_seconds_bound / 3600
    cost = "" if price is None else f", {price * plan.chip_hours_bound:,.0f} at {price:g} each"
    return f"{hours:,.1f} hours, {plan.chip_hours_bound:,.0f} chip-hours{cost}"


def _options(plan: Plan) -> str:
    """Returns the options of `grit-jax train` that choose the plan."""
    mesh = [f"--config.mesh.{axis}={size}" for axis, size in plan.mesh.items() if size > 1]
    remat = f"--config.model.remat={plan.remat}"
    return " ".join([*mesh, remat, f"--config.grad_cache_chunks={plan.grad_cache_chunks}"])


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
