"""Compares the speed of embedding and generating with torch: python benchmarks/inference.py

Both sides have the same random weights, texts and prompts: grit-jax (`GritLM`), and torch with
`transformers` (sdpa) as in the original, with texts in batches of 256 in their order, padded to the
longest text of the batch. The sides run alternately, each time in a new process; the first
call of each case is not counted. In float32 the results must agree, or no table is printed.

    encode full       texts that fill their rows
    encode sample     texts as long as passages of the embedded sample (sample_lengths.npz)
    decode 1, 8       greedy decoding of 64 tokens after 1 or 8 prompts of 32 tokens

    --dtype bfloat16  dtype of parameters and computation, on both sides
    --preset tiny     a model so small that only the agreement is of interest
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from step_work import LENGTHS_FILE, SETTINGS

CASES = ("encode full", "encode sample", "decode 1", "decode 8")
BATCH_SIZE, PROMPT, NEW = 256, 32, 64
# Maximum difference between embeddings of the two sides in float32.
TOLERANCE = 1e-4


def main() -> None:
    """Runs both sides, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("124m", "tiny"), default="124m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=3, help="calls of each case in a process (3)")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each side (2)")
    options = parser.parse_args()
    seconds: dict[tuple[str, str], list[float]] = {}
    returned: dict[tuple[str, str], Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        _in_process(save_model, options.preset, folder)
        for side in options.sides * options.repeats:
            measured = _in_process(
                measure, side, options.preset, options.dtype, options.cases,
                options.rounds, folder,
            )  # fmt: skip
            for case, (times, result) in measured.items():
                seconds.setdefault((case, side), []).extend(times)
                returned[case, side] = result
    if options.dtype == "float32" and len(options.sides) > 1:
        compare(returned, options.cases)
    Console(width=100).print(speed_table(options, seconds))


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        return executor.submit(function, *arguments).result()


def speed_table(options: argparse.Namespace, seconds: dict[tuple[str, str], list[float]]) -> Table:
    """Returns a table of the tokens per second of each case and side, and the ratio to torch."""
    table = Table(title=f"{options.preset}, {options.dtype}")
    for column in ("case", "side", "s, median", "min", "max", "tokens/s", "speedup"):
        table.add_column(column, justify="left" if column in ("case", "side") else "right")
    for case in options.cases:
        for side in options.sides:
            own = seconds[case, side]
            torch_seconds = seconds.get((case, "torch"), own)
            table.add_row(
                case,
                side,
                f"{statistics.median(own):.2f}",
                f"{min(own):.2f}",
                f"{max(own):.2f}",
                f"{num_tokens(case, options.preset) / statistics.median(own):,.0f}",
                f"{statistics.median(torch_seconds) / statistics.median(own):.2f}",
            )
    return table


def compare(returned: dict[tuple[str, str], Any], cases: list[str]) -> None:
    """Checks that both sides return the same results.

    Raises:
      SystemExit: embeddings differ by more than rounding, or tokens differ.
    """
    for case in cases:
        ours, theirs = returned[case, "grit-jax"], returned[case, "torch"]
        difference = float(np.abs(np.asarray(ours) - np.asarray(theirs)).max())
        if not difference <= (TOLERANCE if case.startswith("encode") else 0):
            raise SystemExit(f"{case}: the sides differ by {difference}")


def work(case: str, preset: str) -> list[np.ndarray]:
    """Returns the token ids of a case's texts or prompts."""
    random = np.random.default_rng(0)
    kind, size = case.split()
    if kind == "decode":
        lengths = [PROMPT] * int(size)
    elif size == "full":
        lengths = [256] * 16
    else:
        with np.load(LENGTHS_FILE) as stored:
            passages = stored["passage"].ravel()
        lengths = random.permutation(passages[passages > 0])[:BATCH_SIZE]
    return [random.integers(3, SETTINGS[preset].sizes["vocab_size"], n) for n in lengths]


def num_tokens(case: str, preset: str) -> int:
    """Returns the number of embedded or generated tokens, without padding."""
    texts = work(case, preset)
    return NEW * len(texts) if case.startswith("decode") else sum(map(len, texts))


def save_model(preset: str, folder: str) -> None:
    """Writes a model with random weights."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = SETTINGS[preset].sizes
    MistralForCausalLM(MistralConfig(**sizes, sliding_window=None)).save_pretrained(folder)


def measure(
    side: str, preset: str, dtype: str, cases: list[str], rounds: int, folder: str
) -> dict[str, tuple[list[float], Any]]:
    """Returns for each case the seconds of each call of a side, and the result."""
    encode, decode = SIDES[side](Path(folder), dtype)
    measured = {}
    for case in cases:
        texts, seconds, result = work(case, preset), [], None
        for _ in range(rounds + 1):
            start = time.perf_counter()
            result = encode(texts) if case.startswith("encode") else decode(texts)
            seconds.append(time.perf_counter() - start)
        measured[case] = seconds[1:], result
    return measured


def jax_side(folder: Path, dtype: str) -> tuple[Callable, Callable]:
    """Returns the functions of grit-jax that embed and generate."""
    from grit_jax import GritLM

    model = GritLM.from_pretrained(folder, dtype=dtype)
    model = GritLM(model.model, model.mesh, end_tokens=[])

    def encode(texts: list[np.ndarray]) -> Any:
        return model.encode(texts, batch_size=BATCH_SIZE)

    def decode(prompts: list[np.ndarray]) -> Any:
        return np.stack(model.generate(prompts, NEW))

    return encode, decode


def torch_side(folder: Path, dtype: str) -> tuple[Callable, Callable]:
    """Returns the embedding and generation functions of torch."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    @torch.inference_mode()
    def encode(texts: list[np.ndarray]) -> Any:
        # With a mask, transformers follows the configuration; without one, the keyword.
        model.config.is_causal = False
        embeddings = []
        for start in range(0, len(texts), BATCH_SIZE):
            rows = [torch.from_numpy(text) for text in texts[start : start + BATCH_SIZE]]
            tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            lengths = torch.tensor([len(row) for row in rows])
            is_token = torch.arange(tokens.shape[1])[None] < lengths[:, None]
            output: Any = model.model(tokens, attention_mask=is_token.long(), is_causal=False)
            weights = is_token.float()[..., None]
            mean = (output.last_hidden_state.float() * weights).sum(1) / weights.sum(1)
            embeddings.append(functional.normalize(mean, dim=-1))
        return torch.cat(embeddings).numpy()

    @torch.inference_mode()
    def decode(prompts: list[np.ndarray]) -> Any:
        model.config.is_causal = True
        tokens = torch.from_numpy(np.stack(prompts))
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        mask = torch.ones_like(tokens)
        generated = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, **options)
        return generated[:, tokens.shape[1] :].numpy()

    return encode, decode


# Each process imports only the packages of its own side.
SIDES = {"torch": torch_side, "grit-jax": jax_side}

if __name__ == "__main__":
    main()
