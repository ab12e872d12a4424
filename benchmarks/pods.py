"""What GritLM's steps take on TPU slices: python benchmarks/pods.py [--plans FILE] [--only WORD]

Compiles every row of the table by `grit-jax plan`, for minutes each, and prints the table. A row
that is in the file of plans is not compiled again: delete the file after a change of the step.
"""

import argparse
import dataclasses
import json
from pathlib import Path
import subprocess
import sys

SAVE_MATMULS = "--config.model.remat=save_matmuls"
EXPERTS = "--config.mesh.expert=8"


@dataclasses.dataclass(frozen=True)
class Row:
    """A model on a slice, with what is set on top of its configuration.

    Attributes:
      model: a file in `configs/`.
      accelerator: the slice's name at Google Cloud; a v5p counts two cores a chip.
      topology: chips and sizes of a slice.
      slices: number of slices.
      chunks: `config.grad_cache_chunks`.
      fields: other fields.
    """

    model: str
    accelerator: str
    topology: str
    slices: int = 1
    chunks: int = 1
    fields: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """The arguments of `grit-jax plan`."""
        return [
            f"--config=configs/{self.model}.py",
            f"--topology={self.topology}",
            f"--slices={self.slices}",
            f"--config.grad_cache_chunks={self.chunks}",
            *self.fields,
        ]


ROWS = [
    Row("gritlm_7b", "v5litepod-64", "v5e:8x8", chunks=2),
    Row("gritlm_7b", "v5litepod-256", "v5e:16x16"),
    Row("gritlm_7b", "2 x v5litepod-256", "v5e:16x16", slices=2),
    Row("gritlm_7b", "v6e-64", "v6e:8x8"),
    Row("gritlm_7b", "v6e-256", "v6e:16x16"),
    Row("gritlm_7b", "v5p-16", "v5p:2x2x2", chunks=4),
    Row("gritlm_7b", "v5p-32", "v5p:2x2x4"),
    Row("gritlm_7b", "v5p-64", "v5p:2x4x4"),
    Row("gritlm_7b", "v5p-128", "v5p:4x4x4"),
    Row("gritlm_7b", "v5p-256", "v5p:4x4x8", fields=(SAVE_MATMULS,)),
    Row("gritlm_8x7b", "v5p-128", "v5p:4x4x4", fields=(EXPERTS,)),
    Row("gritlm_8x7b", "v5p-256", "v5p:4x4x8", fields=(EXPERTS,)),
    Row("gritlm_8x7b", "v6e-256", "v6e:16x16", fields=(EXPERTS,)),
]


def main() -> None:
    """Compiles what is not in the file, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=Path, default=Path("benchmarks/pods.jsonl"))
    parser.add_argument("--only", default="", help="compile rows whose command has this word")
    arguments = parser.parse_args()
    plans = read_plans(arguments.plans)
    for row in ROWS:
        key = " ".join(row.command)
        if key not in plans and arguments.only in key:
            plans[key] = compile_row(row)
            with arguments.plans.open("a") as file:
                file.write(json.dumps({"command": key, "plan": plans[key]}) + "\n")
    print_table({row: plans[key] for row in ROWS if (key := " ".join(row.command)) in plans})


def read_plans(path: Path) -> dict[str, dict]:
    """Returns the plans of earlier runs by their command."""
    if not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["command"]: line["plan"] for line in lines}


def compile_row(row: Row) -> dict:
    """Returns the plan of a row, without its list of collectives."""
    print("compiling", *row.command, file=sys.stderr, flush=True)
    grit_jax = Path(sys.executable).with_name("grit-jax")
    command = [grit_jax, "plan", "--json", *row.command]
    plan = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    del plan["collectives"]
    return plan


def print_table(plans: dict[Row, dict]) -> None:
    """Prints the plans as a table of Markdown."""
    columns = ("model", "slice", "chips", "set", "GiB of a chip", "s: products", "memory", "links")
    columns += ("network", "tokens/s at best", "MFU at best")
    print(*(f"| {column} " for column in columns), "|", sep="")
    print("|---|---|" + "---:|" * (len(columns) - 2))
    for row, plan in plans.items():
        print(*(f"| {cell} " for cell in cells(row, plan)), "|", sep="")


def cells(row: Row, plan: dict) -> list[str]:
    """Returns a line of the table."""
    gib = 2**30
    axes = [f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1]
    chunks = [f"{row.chunks} chunks"] if row.chunks > 1 else []
    remat = [] if plan["remat"] == "full" else [plan["remat"]]
    used, limit = plan["hbm_bytes_per_chip"] / gib, plan["hbm_limit_bytes_per_chip"] / gib
    start = [
        row.model.removeprefix("gritlm_").upper().replace("X", "x"),
        row.accelerator,
        str(plan["num_chips"]),
        ", ".join(axes + remat + chunks),
        f"{used:.1f} of {limit:.1f}",
    ]
    if not plan["fits"]:
        return [*start, "does not fit", *5 * [""]]
    seconds = [plan[f"{what}_seconds"] for what in ("compute", "hbm", "ici", "dcn")]
    return [
        *start,
        *(f"{value:.2f}" for value in seconds),
        f"{plan['tokens_per_step'] / plan['step_seconds_bound']:,.0f}",
        f"{plan['mfu_bound']:.0%}",
    ]


if __name__ == "__main__":
    main()
