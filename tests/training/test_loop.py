"""The training loop prefetches batches in order, and reports the time spent waiting for them."""

import functools
import json
import os
from pathlib import Path
import socket
import subprocess
import sys
import time

import jax
import numpy as np
from prepared_data import chat_examples, embedding_examples, open_datasets, write_prepared
import pytest

from grit_jax.data.batches import Batches
from grit_jax.data.sampling import MixedSampler
from grit_jax.data.shapes import RowLimits
from grit_jax.models import ModelConfig
from grit_jax.sharding import local_shards, make_mesh
from grit_jax.training.flops import useful_flops
from grit_jax.training.hooks.step_timer import Goodput, StepTimer
from grit_jax.training.joint_loss import LossConfig, make_joint_loss
from grit_jax.training.loop import NotFiniteError, SkipGuard, StepReport, train
from grit_jax.training.optimizer import learning_rate_schedule, make_optimizer
from grit_jax.training.train_step import Trainer

ROOT = Path(__file__).parents[2]
MODEL = ModelConfig(
    vocab_size=8,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
)
OPTIMIZER = {
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "embedding_lr_multiplier": 1.0,
    "mu_dtype": "float32",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    random = np.random.default_rng(0)
    write_prepared(folder, "pairs", embedding_examples(random, 40, 12))
    write_prepared(folder, "chats", chat_examples(random, 40, 24))
    return folder


def make_batches(folder, held=None):
    samplers = {
        "embedding": MixedSampler(open_datasets(folder, {"pairs": 1.0}), 8, 2, seed=0),
        "generative": MixedSampler(open_datasets(folder, {"chats": 1.0}), 8, 0, seed=1),
    }
    longest = dict.fromkeys(("query", "passage", "chat"), 24)
    limits = RowLimits(longest=longest, length_multiple=8, count_multiple=8)
    return Batches(samplers, limits, held)


@functools.cache
def make_trainer():
    optimizer = make_optimizer(learning_rate_schedule(0.01, 0.0, 10), **OPTIMIZER)
    loss = LossConfig(
        embedding_weight=1.0,
        generative_weight=1.0,
        temperature=0.1,
        generative_reduction="mean",
        generative_group_size=8,
    )
    return Trainer(MODEL, make_joint_loss(loss), optimizer, make_mesh())


def run(batches, steps):
    """Trains on these batches, and returns the metrics reported after each step."""
    lines = []
    trainer = make_trainer()
    receivers = [lambda step, metrics: lines.append({"step": step, **metrics})]
    step_timer = StepTimer(1, steps, lambda _: 0.0, receivers, Goodput([]), peak_flops=1e9)
    state = train(trainer, trainer.initial_state(0), batches, [step_timer], lambda _: None)
    assert int(state.step) == steps
    return lines


def test_every_batch_is_a_step_and_the_next_one_is_fetched_before_the_hooks(folder):
    batches, events = make_batches(folder), []

    def fetched():
        for step in range(4):
            events.append(f"batch {step}")
            yield batches[step]

    trainer = make_trainer()
    state = train(
        trainer,
        trainer.initial_state(0),
        fetched(),
        [lambda report: events.append(f"step {report.step}")],
        lambda _: None,
    )
    assert int(state.step) == 4
    assert events == [
        "batch 0",
        *(f"{w} {n}" for n in (1, 2, 3) for w in ("batch", "step")),
        "step 4",
    ]


def test_tokens_are_counted_in_the_batch_of_the_step(folder):
    batches = make_batches(folder)
    lines = run((batches[step] for step in range(3)), 3)
    assert [line["tokens"] for line in lines] == [int(batches[s].num_tokens) for s in range(3)]


def test_useful_work_is_that_of_the_batch_divided_by_the_seconds_of_its_step(folder):
    batches = [make_batches(folder)[step] for step in range(3)]
    for line, batch in zip(run(iter(batches), 3), batches, strict=True):
        needed = useful_flops(MODEL, batch, causal_streams={"chat"})
        speed = needed / line["step_seconds"]
        np.testing.assert_allclose(line["useful_tflops_per_second"], speed / 1e12)
        np.testing.assert_allclose(line["mfu"], speed / 1e9)
        assert "useful_flops" not in line


def test_waiting_for_slow_batches_is_reported(folder, monkeypatch):
    ready = [make_batches(folder)[step] for step in range(5)]
    clock, waited = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + waited[0])
    # Waiting counts only if the devices have finished the step.
    trainer = make_trainer()
    step = trainer.step
    monkeypatch.setattr(trainer, "step", lambda *args: jax.block_until_ready(step(*args)))

    def slow():
        for index, batch in enumerate(ready):
            waited[0] += 100 if index in (3, 4) else 0
            yield batch

    # The second step and those after it are compiled; the last has no batch to wait for.
    fractions = [line["data_wait_fraction"] for line in run(slow(), 5)]
    assert fractions[2] > 0.5 and fractions[3] > 0.5
    assert fractions[4] < 0.5
    assert all(line["data_wait_fraction"] < 0.5 for line in run(iter(ready), 5))


def test_no_batches_leave_the_state_as_it_is(folder):
    assert run(iter([]), 0) == []


def test_one_process_holds_all_rows():
    for axes in ({}, {"tensor": 2}, {"slice": 2, "expert": 2}):
        mesh = make_mesh(**axes)
        assert local_shards(mesh) == list(range(8 // axes.get("tensor", 1)))


def test_rows_of_a_batch_are_split_over_the_devices_in_order(folder):
    trainer, batch = make_trainer(), make_batches(folder)[0]
    placed = trainer.to_devices(batch)
    for name in ("tokens", "segment_ids", "positions", "mask"):
        array, host = (getattr(b.parts["generative"].chats, name) for b in (placed, batch))
        np.testing.assert_array_equal(array, host)
        assert array.addressable_shards[0].data.shape[0] == len(host) // 8
    assert placed.parts["embedding"].positives.is_fully_replicated


HOST = """
import json, sys
import jax
address, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, num_processes=2, process_id=process)
sys.path[:0] = ["tests", "tests/training"]
from pathlib import Path
import numpy as np
from grit_jax.sharding import batch_shards, local_shards, make_mesh
import test_loop

whole = test_loop.make_batches(Path(folder))
trainer = test_loop.make_trainer()

def compare(tensor):
    trainer.mesh = mesh = make_mesh(tensor=tensor)
    held = local_shards(mesh)
    rows_of_shard = 8 // batch_shards(mesh)
    own_rows = [rows_of_shard * shard + n for shard in held for n in range(rows_of_shard)]
    own = test_loop.make_batches(Path(folder), own_rows)
    for step in (0, 17):
        expected, placed = whole[step], trainer.to_devices(own[step])
        expected, placed = expected.parts["embedding"], placed.parts["embedding"]
        for name in ("queries", "passages"):
            array = getattr(placed, name).tokens
            rows = getattr(expected, name).tokens
            assert array.shape == rows.shape, (array.shape, rows.shape)
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(shard.data, rows[shard.index])
        np.testing.assert_array_equal(
            placed.positives.addressable_data(0), expected.positives
        )
    return held

print(json.dumps([compare(tensor) for tensor in (1, 2)]))
"""


@pytest.mark.slow
def test_two_hosts_combine_the_rows_that_each_has_read(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(process), str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    # The shards of each host without and with tensor parallelism.
    for host, shards in zip(hosts, [[(0, 4), (0, 2)], [(4, 8), (2, 4)]], strict=True):
        output, errors = host.communicate(timeout=900)
        assert host.returncode == 0, errors
        assert json.loads(output.splitlines()[-1]) == [list(range(*each)) for each in shards]


def test_a_run_stops_when_too_many_steps_in_a_row_are_skipped():
    hook = SkipGuard(max_consecutive_skips=2)
    # Consecutive skips after each step; a step is checked after the next one.
    for step, count in enumerate([0, 1, 2, 0, 1, 2, 3], 1):
        hook(StepReport(step, None, {"steps_skipped_in_a_row": count}))
    with pytest.raises(NotFiniteError, match="last 3 steps up to step 7"):
        hook(StepReport(8, None, {"steps_skipped_in_a_row": 4}))
