"""Plans GritLM's steps on TPU slices: python benchmarks/pods.py [--check SLICE]

Compiles every row of the table with `grit-jax plan` (minutes per row), and prints the table. Rows
in the file of plans, `pods.jsonl`, are not compiled again: delete the file after changing the step.
With --check, compiles the row of 7B on that slice again, and fails if it takes more memory than
recorded, or has a higher lower bound on time.
"""

import argparse
import dataclasses
import importlib.metadata
import json
from pathlib import Path
import subprocess
import sys

PLANS = Path(__file__).with_name("pods.jsonl")
# Allowed increase of memory and time, with the same compiler version.
LARGEST_RISE = 1.05

SAVE_MATMULS = "--config.model.remat=save_matmuls"
EXPERTS = "--config.mesh.expert=8"


@dataclasses.dataclass(frozen=True)
class Row:
    """A model on a slice, with overrides of its configuration.

    Attributes:
      model: name of a file in `configs/`.
      accelerator: Google Cloud's name of the slice; v5p counts two cores per chip.
      topology: chip generation and shape of a slice.
      slices: number of slices.
      chunks: `config.grad_cache_chunks`.
      fields: other overrides.
    """

    model: str
    accelerator: str
    topology: str
    slices: int = 1
    chunks: int = 1
    fields: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name of the row in the file of plans."""
        return " ".join(self.command)

    @property
    def command(self) -> list[str]:
        """Arguments of `grit-jax plan`."""
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
    """Compiles rows that are not in the file, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    slices = [row.accelerator for row in ROWS if row.model == "gritlm_7b"]
    parser.add_argument("--check", choices=slices, help="compile one row again and compare")
    checked = parser.parse_args().check
    plans = read_plans()
    if checked:
        row = next(row for row in ROWS if (row.model, row.accelerator) == ("gritlm_7b", checked))
        check(plans[row.key], compile_row(row))
        return
    for row in ROWS:
        if row.key not in plans:
            plans[row.key] = compile_row(row)
            with PLANS.open("a") as file:
                file.write(json.dumps({"command": row.key, "plan": plans[row.key]}) + "\n")
    print_table({row: plans[row.key] for row in ROWS})


def check(before: dict, now: dict) -> None:
    """Compares a plan with the recorded one, and exits with an error if it is worse."""
    names = ("hbm_bytes_per_chip", "step_seconds_bound")
    for name in names:
        print(f"{name:20} {before[name]:>20,.3f} recorded {now[name]:>20,.3f} now")
    if now["libtpu"] != before["libtpu"]:
        print(f"recorded with libtpu {before['libtpu']}, this is {now['libtpu']}: not compared")
    elif any(now[name] > LARGEST_RISE * before[name] for name in names):
        sys.exit(f"a step needs more than {PLANS} says: fix the regression, or delete the file")


def read_plans() -> dict[str, dict]:
    """Returns the recorded plans, by command."""
    if not PLANS.exists():
        return {}
    lines = [json.loads(line) for line in PLANS.read_text().splitlines()]
    return {line["command"]: line["plan"] for line in lines}


def compile_row(row: Row) -> dict:
    """Returns the plan of a row, without its list of collectives."""
    print("compiling", *row.command, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "grit_jax", "plan", "--json", *row.command]
    plan = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    del plan["collectives"]
    return {"libtpu": importlib.metadata.version("libtpu"), **plan}


def print_table(plans: dict[Row, dict]) -> None:
    """Prints the plans as a Markdown table."""
    columns = ("model", "slice", "chips", "mesh", "HBM (GiB)", "matmuls (s)", "HBM (s)", "ICI (s)")
    columns += ("DCN (s)", "max tokens/s", "max MFU")
    print(*(f"| {column} " for column in columns), "|", sep="")
    print("|---|---|" + "---:|" * (len(columns) - 2))
    for row, plan in plans.items():
        print(*(f"| {cell} " for cell in cells(row, plan)), "|", sep="")


def cells(row: Row, plan: dict) -> list[str]:
    """Returns the cells of a row."""
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
