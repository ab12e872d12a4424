"""Training steps compiled with the TPU compiler, on platforms that have libtpu."""

import json
from pathlib import Path

from command_line import assert_fails_in_one_line
from command_line import grit_jax_in_process as grit_jax
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
from prepared_data import embedding_examples, write_prepared
import pytest
import reference_values

from grit_jax.config import ConfigError, default_config, parse_config
from grit_jax.planning import plan as plan_module
from grit_jax.planning.chips import CHIPS, TopologyError, describe_topology, dimensions_spanned
from grit_jax.planning.plan import fastest, make_plan, search
from grit_jax.planning.program import program_cost
from grit_jax.sharding import MeshError, make_mesh

pytest.importorskip("libtpu", reason="libtpu has no wheel for this platform")

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENS = {"query": 64, "passage": 64, "chat": 256}
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def small_config(**mesh):
    config = default_config()
    config.model.sizes = SIZES
    config.data.embedding_batch_size, config.data.generative_batch_size = 64, 16
    for stream in ("query", "passage", "chat"):
        config.data[f"{stream}_row_length"] = 512
    for axis, size in mesh.items():
        config.mesh[axis] = size
    return config


def compile_for(topology, function, *shapes):
    return jax.jit(function).lower(*shapes).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs():
    topology = describe_topology("v5e:2x2")
    mesh = Mesh(np.array(topology.devices), ("x",))

    def array(*shape, spec=()):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    def layers(rows, weights):
        def layer(rows, weight):
            return jnp.tanh(rows @ weight), None

        return jax.lax.scan(layer, rows, weights)[0]

    # Rows are split over the chips, and each weight along its inputs: gathered once a layer.
    rows, weights = array(2048, 512, spec=("x",)), array(6, 512, 512, spec=(None, "x"))
    work = program_cost(compile_for(topology, layers, rows, weights), 4)
    assert work.flops == 6 * 2 * (2048 // 4) * 512 * 512
    gathers = {c: n for c, n in work.collectives.items() if c.kind == "all-gather"}
    assert sum(n * c.num_bytes for c, n in gathers.items()) == 6 * 512 * 512 * 2
    assert {c.group for c in gathers} == {(0, 1, 2, 3)}
    # Each layer reads its quarter of a weight and its rows at least, and no more than a few times.
    least = 6 * 512 * 512 * 2 / 4
    assert least <= work.hbm_bytes < 6 * (4 * 512 * 512 * 2 + 4 * 512 * 512 * 2)


def test_a_loop_whose_counter_goes_by_twos_counts_its_turns():
    sharding = NamedSharding(
        Mesh(np.array(describe_topology("v5e:2x2").devices[:1]), ("x",)), PartitionSpec()
    )
    rows = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=sharding)

    def loop(rows, weight):
        def turn(carried):
            count, rows = carried
            return count + 2, jnp.tanh(rows @ weight)

        return jax.lax.while_loop(lambda carried: carried[0] < 15, turn, (0, rows))[1]

    # As where the compiler has unrolled a loop.
    assert program_cost(compile_for(None, loop, rows, rows), 1).flops == 8 * 2 * 256**3


def test_a_copy_beside_other_work_moves_what_it_copies_once():
    # As the compiler writes it: of eight matrices in main memory one is brought in, and back.
    main, fast = "{2,1,0:T(8,128)(2,1)}", "{2,1,0:T(8,128)(2,1)S(1)}"
    all_of_them, one = f"bf16[8,128,128]{main}", f"bf16[1,128,128]{main}"
    near = f"bf16[1,128,128]{fast}"
    text = f"""HloModule step
ENTRY %main (given: bf16[8,128,128]) -> bf16[1,128,128] {{
  %given = {all_of_them} parameter(0)
  %slice-start = (({all_of_them}), {near}, s32[]{{:S(2)}}) slice-start(%given), slice={{[3:4]}}
  %slice-done = {near} slice-done(%slice-start)
  %copy-start = ({one}, {near}, u32[]{{:S(2)}}) copy-start(%slice-done)
  ROOT %copy-done = {one} copy-done(%copy-start)
}}
"""
    assert program_cost(text, 1).hbm_bytes == 2 * 128 * 128 * 2


def test_what_goes_between_chips_is_told_from_what_goes_between_slices():
    topology = describe_topology("v5e:2x2", num_slices=2)
    mesh = make_mesh(slice=2, devices=topology.devices)
    slices = [{device.slice_index for device in half.flat} for half in mesh.devices]
    assert slices == [{0}, {1}]
    with pytest.raises(MeshError, match="multiple of the 2 slices"):
        make_mesh(fsdp=8, devices=topology.devices)
    line = [topology.devices[0], topology.devices[1]]
    assert dimensions_spanned(line) == 1
    assert dimensions_spanned(list(mesh.devices[0].flat)) == 2

    def total(rows):
        return jnp.sum(rows, axis=0)

    sharding = NamedSharding(mesh, PartitionSpec(("slice", "fsdp")))
    rows = jax.ShapeDtypeStruct((8, 1 << 20), jnp.float32, sharding=sharding)
    whole = NamedSharding(mesh, PartitionSpec())
    text = jax.jit(total, out_shardings=whole).lower(rows).compile().as_text()
    work = program_cost(text, 8)
    sent = sum(n * c.num_bytes for c, n in work.collectives.items() if c.kind == "send")
    # Reduced within the slice first: each chip sends its share of the sum.
    assert sent == 4 * (1 << 20) / 4


@pytest.mark.parametrize(
    ("accelerator_type", "name"),
    [
        # From Google's tables of each TPU; v5p counts cores.
        ("v5litepod-4", "v5e:2x2"),
        ("v5litepod-8", "v5e:2x4"),
        ("v5e-64", "v5e:8x8"),
        ("v6e-32", "v6e:4x8"),
        ("v6e-256", "v6e:16x16"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-32", "v5p:2x2x4"),
        ("v5p-64", "v5p:2x4x4"),
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-256", "v5p:4x4x8"),
    ],
)
def test_an_accelerator_type_is_a_topology(accelerator_type, name):
    assert describe_topology(accelerator_type).name == name


@pytest.mark.parametrize("name", ["v9-8", "v5p-7", "v6e-48", "v6e", "v5e:4x4x4", "v6e-x"])
def test_other_names_are_refused(name):
    with pytest.raises(TopologyError, match=f"^--topology={name} must be an accelerator type"):
        describe_topology(name)


@pytest.mark.parametrize(
    ("name", "num_slices"), [("v5p:4x4x4", 1), ("v6e:16x16", 1), ("v5p:4x4x4", 2), ("v5e:4x8", 1)]
)
def test_experts_split_a_side_of_a_block_of_chips(name, num_slices):
    devices = describe_topology(name, num_slices).devices
    for tensor in (1, 2):
        mesh = make_mesh(slice=num_slices, expert=8, tensor=tensor, devices=devices)
        assert mesh.shape["expert"] == 8 and mesh.shape["tensor"] == tensor
        assert set(mesh.devices.flat) == set(devices)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "architecture", "mode", "mesh", "chunks", "recorded"),
    [
        ("v5e:2x2", "mistral", "unified", {}, 1, 53.5e6),
        ("v5p:2x2x1", "mistral", "unified", {"tensor": 2}, 2, 76.9e6),
        # Experts compile for minutes, so in one stream.
        ("v6e:2x2", "mixtral", "generative", {"expert": 2}, 1, 62.7e6),
    ],
)
def test_the_step_compiles_for_each_chip(
    monkeypatch, name, architecture, mode, mesh, chunks, recorded
):
    config = small_config(**mesh)
    config.model.architecture, config.grad_cache_chunks = architecture, chunks
    config.mode = mode
    programs = []
    monkeypatch.setattr(
        plan_module, "program_cost", lambda *a: programs.append(a[0]) or program_cost(*a)
    )
    plan = make_plan(parse_config(config), describe_topology(name), TOKENS)
    for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"):
        assert kernel in programs[0]
    assert plan.fits and plan.num_chips == 4
    embedded = 64 * 64 + 2 * 64 * 64 if mode == "unified" else 0
    assert plan.tokens_per_step == embedded + 16 * 256
    assert plan.hbm_limit_bytes_per_chip == CHIPS[name.split(":")[0]].hbm_bytes
    state = plan.parameter_bytes_per_chip + plan.optimizer_bytes_per_chip
    assert state < plan.hbm_bytes_per_chip < 1.1 * recorded  # A step that needs more shows.
    assert 0 < plan.mfu_bound < 0.75  # Layers are computed twice, and rows are not full.
    assert plan.step_seconds_bound >= max(plan.compute_seconds, plan.hbm_seconds) > 0
    chip_seconds = config.steps * plan.step_seconds_bound * 4
    assert plan.chip_hours_bound == pytest.approx(chip_seconds / 3600)
    if architecture == "mistral":
        # Parameters, and moments of twice their size, lie in quarters.
        D, F, V, L = 256, 512, 1024, 2
        count = L * (4 * D * D + 3 * D * F + 2 * D) + 2 * V * D + D
        assert plan.parameter_bytes_per_chip >= 4 * count / 4
        assert plan.parameter_bytes_per_chip < 4 * count / 4 * 1.01
        assert abs(plan.optimizer_bytes_per_chip / plan.parameter_bytes_per_chip - 2) < 0.01
    if not mesh:
        # Every matrix is gathered once forward and once backward, in bfloat16; nothing larger.
        gathered = [c for c in plan.collectives if c["kind"] == "all-gather" and c["bytes"] > 1e5]
        assert sum(c["bytes"] * c["times"] for c in gathered) < 2.2 * 2 * count


def test_the_weights_that_a_run_starts_from_have_the_say_about_sizes(monkeypatch):
    monkeypatch.setattr(plan_module, "_compile", lambda *a: (None, 0.0))
    config = default_config()
    config.data.embedding_batch_size, config.data.generative_batch_size = 8, 8
    config.model.weights = str(reference_values.FOLDER / "tiny-mistral")
    topology = describe_topology("v5e:2x2")
    whole = make_plan(parse_config(config), topology, TOKENS)
    parameters = jax.tree.leaves(nnx.state(reference_values.load_model("mistral"), nnx.Param))
    least = sum(leaf.nbytes for leaf in parameters) / 4
    assert least <= whole.parameter_bytes_per_chip < 1.1 * least
    config.lora.rank = 2
    adapted = make_plan(parse_config(config), topology, TOKENS)
    assert adapted.parameter_bytes_per_chip > whole.parameter_bytes_per_chip
    assert adapted.optimizer_bytes_per_chip < whole.optimizer_bytes_per_chip / 2


def pretended_plan(config, used, seconds, tokens_per_text):
    return plan_module.Plan(
        topology="1 x v5e:2x2",
        num_chips=4,
        mesh={"tensor": config.mesh.tensor},
        remat=config.model.remat,
        grad_cache_chunks=config.grad_cache_chunks,
        rows={},
        tokens_per_text=tokens_per_text,
        tokens_per_step=1,
        fits=used < 16 * plan_module.GIB,
        hbm_bytes_per_chip=used,
        hbm_limit_bytes_per_chip=16 * plan_module.GIB,
        parameter_bytes_per_chip=1.0,
        optimizer_bytes_per_chip=2.0,
        compile_seconds=1.0,
        step_seconds_bound=seconds,
    )


def test_the_search_finds_what_fits(monkeypatch):
    def pretend(config, topology, tokens):
        """Replaces compilation, which is slow: memory halves with chunks and depends on remat."""
        chunks, saves = config.grad_cache_chunks, config.model.remat == "save_matmuls"
        used = (40 if saves else 20) * plan_module.GIB / chunks / config.mesh.tensor
        seconds = (1.0 if saves else 1.2) * (1 + 0.1 * chunks) * (1 + 0.2 * config.mesh.tensor)
        return pretended_plan(config, used, seconds, tokens)

    monkeypatch.setattr(plan_module, "make_plan", pretend)
    plans = list(search(parse_config(small_config()), describe_topology("v5e:2x2"), TOKENS))
    tried = [(plan.mesh["tensor"], plan.remat, plan.grad_cache_chunks) for plan in plans]
    assert tried[:5] == [
        (1, "save_matmuls", 1),
        (1, "save_matmuls", 2),
        (1, "save_matmuls", 4),
        (1, "full", 1),
        (1, "full", 2),
    ]
    best = fastest(plans)
    assert (best.mesh["tensor"], best.remat, best.grad_cache_chunks) == (1, "save_matmuls", 4)
    assert fastest([plan for plan in plans if not plan.fits]) is None


def test_the_search_does_not_pass_over_a_mistake():
    # Nor does it say that nothing fits.
    topology = describe_topology("v5e:2x2")
    with pytest.raises(ConfigError, match=r"config\.data\.chat_row_length=512 is below"):
        list(search(parse_config(small_config()), topology, TOKENS | {"chat": 4000}))
    with pytest.raises(MeshError, match=r"config\.mesh\.expert=4 is for a Mixtral"):
        list(search(parse_config(small_config(expert=4)), topology, TOKENS))


def test_attention_that_does_not_serve_a_step_is_named():
    config = small_config()
    config.model.attention_implementation = "cudnn"
    with pytest.raises(ConfigError, match="'cudnn' does not support the platform tpu"):
        make_plan(parse_config(config), describe_topology("v5e:2x2"), TOKENS)


def test_average_lengths_are_those_of_the_data(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    examples = {
        "nli": embedding_examples(random, 20, 40),
        "quora": embedding_examples(random, 9, 90),
    }
    for name, listed in examples.items():
        write_prepared(tmp_path, name, listed)
    rates = {"nli": 3, "quora": 1}
    (tmp_path / "embedding.json").write_text(json.dumps({"rates": rates}))
    passages = {
        name: np.mean([len(text) for each in listed for text in each.positives + each.negatives])
        for name, listed in examples.items()
    }
    expected = round((3 * passages["nli"] + passages["quora"]) / 4)

    made = []
    monkeypatch.setattr(
        "grit_jax.planning.command.make_plan",
        lambda *a: made.append(a[2]) or pretended_plan(a[0], 1.0, 1.0, tokens_per_text=a[2]),
    )
    command = [
        *("plan", f"--config={CONFIGS / 'gritlm_7b.py'}", f"--config.data.folder={tmp_path}"),
        *("--config.data.embedding=embedding", "--query-tokens=7", "--topology=v5e-4"),
    ]
    plan = json.loads(grit_jax(*command, "--json", cwd=tmp_path).stdout)
    assert made == [plan["tokens_per_text"]] == [{"query": 7, "passage": expected, "chat": 1024}]
    assert plan["tokens_per_text_from"] == {
        "query": "--query-tokens",
        "passage": str(tmp_path),
        "chat": "assumed",
    }
    printed = grit_jax(*command, cwd=tmp_path).stdout
    assert "query 7 (--query-tokens), passage" in printed and "chat 1024 (assumed)" in printed


def test_fields_that_are_taken_from_the_data_need_it(tmp_path):
    config = CONFIGS / "finetune.py"
    wrong = grit_jax("plan", f"--config={config}", "--topology=v5e-4", cwd=tmp_path)
    assert_fails_in_one_line(wrong, "config.data.folder", "has no prepared data")


@pytest.mark.slow
def test_the_command_prints_one_object(tmp_path):
    config = tmp_path / "small.py"
    config.write_text(
        "from grit_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.model.sizes = {SIZES}\n"
        "    config.mode = 'generative'\n"
        "    config.data.generative_batch_size = 16\n"
        "    return config\n"
    )
    options = ["--topology=v5e-4", "--json", "--chat-tokens=256", "--price-per-chip-hour=2"]
    finished = grit_jax("plan", f"--config={config}", *options, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == "compiling the training step for 4 chips (v5e-4) ...\n"
    plan = json.loads(finished.stdout)
    assert plan["cost_bound"] == 2 * plan["chip_hours_bound"] > 0
    for name in (
        "fits",
        "hbm_bytes_per_chip",
        "hbm_limit_bytes_per_chip",
        "flops_per_step",
        "step_seconds_bound",
        "mfu_bound",
    ):
        assert plan[name], name
    assert plan["rows"] == {"chat": "4x2048"} and plan["tokens_per_step"] == 16 * 256

    wrong = grit_jax("plan", f"--config={config}", "--topology=v9:2x2", cwd=tmp_path)
    assert_fails_in_one_line(wrong, "--topology=v9:2x2", "v5e, v5p, v6e")
    wrong = grit_jax(
        "plan", f"--config={config}", "--topology=v5e:2x2", "--config.mesh.tensor=3", cwd=tmp_path
    )
    assert_fails_in_one_line(wrong, "tensor=3")
