"""The command `grit-jax plan`."""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import sys
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from grit_jax.config import Config, ConfigError
from grit_jax.config_flags import parse_flags
from grit_jax.config_from_data import average_tokens, complete_config
from grit_jax.planning.chips import describe_topology, suppress_stderr
from grit_jax.planning.plan import fastest, make_plan, search
from grit_jax.planning.report import as_json, print_line, print_plan

# Assumed average tokens of a text in each stream, without an option or prepared data.
AVERAGE_TOKENS = {"query": 64, "passage": 256, "chat": 1024}


def run(argv: Sequence[str]) -> None:
    """Compiles a training step for TPUs without having any, and prints whether it fits.

    Raises:
      BucketError, ConfigError, MeshError, PreparedDataError, TopologyError: the message says what
        is wrong.
    """
    arguments, rest = _parser().parse_known_args(argv)
    jax.config.update("jax_platforms", "cpu")  # Nothing runs: do not look for devices.
    if arguments.slices > 1:
        rest.append(f"--config.mesh.slice={arguments.slices}")
    config, _ = parse_flags(rest)
    config = complete_config(config)
    tokens, sources = _average_tokens(config, arguments)
    with suppress_stderr():
        topology = describe_topology(arguments.topology, arguments.slices)
    what = f"compiling the training step for {len(topology.devices)} chips ({arguments.topology})"
    plan: Any = None
    if not arguments.search:
        with _progress(what):
            plan = make_plan(config, topology, tokens)
    else:
        tried, plans = [], search(config, topology, tokens)
        while True:
            with _progress(f"{what}, try {len(tried) + 1}"):
                plan = next(plans, None)
            if plan is None:
                break
            tried.append(plan)
            if not arguments.json:
                print_line(plan)
        plan = fastest(tried)
    if plan is None:
        raise ConfigError(
            "no plan fits: use more chips, or lower config.data.embedding_batch_size or "
            "config.data.generative_batch_size"
        )
    if arguments.json:
        print(as_json(plan, sources, arguments.price_per_chip_hour))
    else:
        print_plan(plan, sources, arguments.price_per_chip_hour)


def _average_tokens(
    config: Config, arguments: argparse.Namespace
) -> tuple[dict[str, int], dict[str, str]]:
    """Returns the average tokens of a text in each stream, and where each number is from."""
    measured = average_tokens(config)
    tokens, sources = {}, {}
    for stream, assumed in AVERAGE_TOKENS.items():
        given = getattr(arguments, f"{stream}_tokens")
        if given is not None:
            tokens[stream], sources[stream] = given, f"--{stream}-tokens"
        elif stream in measured:
            tokens[stream], sources[stream] = max(1, round(measured[stream])), config.data.folder
        else:
            tokens[stream], sources[stream] = assumed, "assumed"
    return tokens, sources


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """Shows on standard error what is being done, and for how long on a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"{what} ...", file=sys.stderr, flush=True)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grit-jax plan",
        description="Compiles a training step for TPUs without having any, and reports its memory "
        "use and speed.",
        epilog="--config FILE and --config.FIELD=VALUE are those of grit-jax train.",
    )
    parser.add_argument(
        "--topology",
        required=True,
        help="chips of a slice: an accelerator type, such as v6e-64 or v5p-128 (cores), or a "
        "shape, such as v5e:4x4 or v5p:4x4x4",
    )
    parser.add_argument("--slices", type=_positive, default=1, help="number of slices (default 1)")
    parser.add_argument(
        "--search",
        action="store_true",
        help="try meshes, remat policies and GradCache chunks, and recommend the fastest that fits",
    )
    parser.add_argument(
        "--price-per-chip-hour", type=_price, help="adds the cost of the run to the plan"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for stream, tokens in AVERAGE_TOKENS.items():
        help_text = f"average tokens of a {stream} (those of the prepared data, or else {tokens})"
        parser.add_argument(f"--{stream}-tokens", type=_positive, help=help_text)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _price(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value
