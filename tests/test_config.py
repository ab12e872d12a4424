"""Configurations: those of the project are complete; mistakes are named in one line."""

import dataclasses
import json
from pathlib import Path
import shutil

from etils import epath
import jax
from ml_collections import ConfigDict
import numpy as np
import pytest
import reference_values
from tokenizer_files import write_tokenizer

from grit_jax.config import RENAMED, ConfigError, changed_fields, default_config, parse_config
from grit_jax.config_flags import parse_flags
from grit_jax.data.manifest import PreparedDataError
from grit_jax.from_config import (
    check_attention,
    check_tokenizer,
    make_batches,
    make_held_out,
    make_trainer,
    model_config,
    open_pretrained,
)
from grit_jax.models import config_to_hugging_face, lora_layers, make_config, weights_of
from grit_jax.models.weights import linear_layers
from grit_jax.run import run
from grit_jax.sharding import MeshError
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.training.optimizer import learning_rate_schedule

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
MISTRAL_7B, MIXTRAL_8X7B = 7_241_732_096, 46_702_792_704
PARAMETERS = {
    "gemma3_1b": 999_885_952,
    "llama3_8b": 8_030_261_248,
    "qwen3_0_6b": 596_049_920,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "embedding_7b": MISTRAL_7B,
    "generative_7b": MISTRAL_7B,
    "gritlm_7b": MISTRAL_7B,
    "gritlm_8x7b": MIXTRAL_8X7B,
}


def config_flag(name):
    return next(f"--config={path}" for path in CONFIGS if path.stem == name)


TINY = config_flag("gritlm_tiny")
TINY_MODELS = reference_values.FOLDER


def parse(*argv):
    return parse_flags(argv)[0]


def one_line(error):
    """The message of an error, which a user sees as the last line of a failed run."""
    message = str(error.value)
    assert "\n" not in message
    return message


# ---- The files in configs/ ----


def test_the_papers_runs_and_a_tiny_one_are_there():
    assert {path.stem for path in CONFIGS} >= PARAMETERS.keys() | {"gritlm_tiny"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_has_every_field(path):
    config, workdir = parse_flags([f"--config={path}"])
    assert config.to_dict().keys() == default_config().to_dict().keys()
    assert workdir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_describes_a_whole_training_state(path):
    state = make_trainer(parse(f"--config={path}")).abstract_state()
    leaves = jax.tree.leaves(state.parameters)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves), "takes memory"
    count = sum(leaf.size for leaf in leaves)
    assert count == PARAMETERS.get(path.stem, count)
    # Two moments for each parameter; what is left are counters.
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer_state) if leaf.ndim)
    assert moments == 2 * count


# ---- The command line ----


@pytest.mark.parametrize(
    ("flag", "section", "field", "value"),
    [
        ("--config.optimizer.learning_rate=1e-4", ("optimizer",), "learning_rate", 1e-4),
        ("--config.optimizer.learning_rate=1", ("optimizer",), "learning_rate", 1.0),
        ("--config.model.sizes.hidden_size=64", ("model", "sizes"), "hidden_size", 64),
        ("--config.steps=7", (), "steps", 7),
        ("--config.evaluation.enabled=false", ("evaluation",), "enabled", False),
        ("--config.data.folder=elsewhere", ("data",), "folder", "elsewhere"),
    ],
)
def test_a_flag_overrides_a_field_and_no_other(flag, section, field, value):
    config, expected = parse(TINY, flag).to_dict(), parse(TINY).to_dict()
    changed, holder = config, expected
    for name in section:
        changed, holder = changed[name], holder[name]
    assert changed[field] == value
    assert type(changed[field]) is type(value)
    assert holder[field] != value
    holder[field] = value
    assert config == expected


def test_sizes_of_the_command_line_reach_the_model():
    assert model_config(parse(TINY, "--config.model.sizes.hidden_size=64")).hidden_size == 64


def test_a_size_that_the_file_leaves_out_can_be_set():
    sizes = ("num_hidden_layers=4", "sliding_window=4096")
    config = parse(config_flag("gritlm_7b"), *(f"--config.model.sizes.{size}" for size in sizes))
    assert model_config(config).num_hidden_layers == 4
    assert model_config(config).sliding_window == 4096


@pytest.mark.parametrize("flag", ["architecture=mixtral", "architecture mixtral"])
def test_the_sizes_are_those_of_the_architecture_of_the_command_line(flag):
    argv = f"{config_flag('gritlm_7b')} --config.model.{flag} --config.model.sizes.vocab_size=99"
    model = model_config(parse(*argv.split(" ")))
    expected = make_config("mixtral")
    assert model.has_experts and model.vocab_size == 99
    for size in ("rope_theta", "num_local_experts", "intermediate_size"):
        assert getattr(model, size) == getattr(expected, size)


def test_the_working_directory_can_be_chosen():
    assert parse_flags([TINY, "--workdir=somewhere"])[1] == "somewhere"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([TINY, "--config.optimizer.learning_rat=1"], "learning_rat"),
        ([TINY, "--config.optimiser.learning_rate=1"], "optimiser"),
        ([TINY, "--config.model.sizes.hidden_siz=1"], "hidden_siz"),
        ([TINY, "--config.lr=1"], "config.lr: there is no such field"),
        ([TINY, "--config.optimizer.adam.beta=1"], "config.optimizer.adam: there is no such field"),
        ([TINY, "--config.steps=abc"], "config.steps=abc"),
        ([TINY, "--config.steps=1.5"], "config.steps=1.5"),
        ([TINY, "--config.optimizer.learning_rate=abc"], "config.optimizer.learning_rate=abc"),
        ([TINY, "--config.steps=0"], "config.steps=0"),
        ([TINY, "--config.mode=both"], "config.mode='both'"),
        ([TINY, "--config.data.group_size=0"], "config.data.group_size=0"),
        ([TINY, "--config.checkpoint.every_steps=0"], "config.checkpoint.every_steps=0"),
        ([TINY, "--config.stepss=1"], "stepss"),
        ([TINY, "--config.grad_cache_chunks=0"], "config.grad_cache_chunks=0"),
        ([TINY, "--config.optimizer.learning_rate=nan"], "config.optimizer.learning_rate=nan"),
        ([TINY, "--config.loss.temperature=inf"], "config.loss.temperature=inf"),
        ([TINY, "--workdirr=x"], "workdirr"),
        ([TINY, "stray"], "stray"),
        (["--config=configs/none.py"], "configs/none.py"),
        (["--config=configs"], "configs"),
        (["--workdir=x"], "--config=FILE is missing"),
        ([], "--config=FILE is missing"),
        (["--config"], "Missing value for flag --config"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_in_one_line(argv, named):
    with pytest.raises(ConfigError) as error:
        parse_flags(argv)
    assert named in one_line(error)


def test_a_misspelt_field_is_said_in_words():
    with pytest.raises(ConfigError) as error:
        parse(TINY, "--config.optimizer.learning_rat=1")
    assert "learning_rate" in one_line(error)
    assert "\\" not in one_line(error), "escapes of a message within a message"


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_field_is_refused_with_its_new_name(own_file, old, new):
    assert RENAMED.keys().isdisjoint(RENAMED.values())
    for argv in ([TINY, f"--{old}=1"], [TINY, f"--{old}", "1"], [own_file(f"{old} = 1")]):
        with pytest.raises(ConfigError) as error:
            parse_flags(argv)
        assert one_line(error) == f"{old} is now {new}"


# ---- A user's own file ----


@pytest.fixture
def own_file(tmp_path):
    """Returns the flag of a configuration that starts from the default and has these lines."""

    def write(*lines):
        path = tmp_path / "own.py"
        body = "\n    ".join(["config = default_config()", *lines, "return config"])
        path.write_text(
            f"from grit_jax.config import default_config\n\n\ndef get_config():\n    {body}\n",
            encoding="utf-8",
        )
        return f"--config={path}"

    return write


def test_a_users_own_file_is_read(own_file):
    config, workdir = parse_flags([own_file("config.steps = 3")])
    assert config.steps == 3
    assert workdir == "runs/own"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("config.optimiser = {}", "config.optimiser: there is no such field; did you mean config"),
        ("config.optimizer.learning_rat = 1.0", "config.optimizer.learning_rat"),
        ("config.loss.temperatur = 1.0", "did you mean config.loss.temperature?"),
        ("del config.steps", "config.steps is missing"),
        ("config.steps = -1", "config.steps=-1"),
        ("config.steps = 2.5", "own.py"),
        ("config.optimizer = 3", "own.py"),
        ("config = 3", "own.py"),
    ],
)
def test_a_mistake_in_a_users_file_is_named_in_one_line(own_file, line, named):
    with pytest.raises(ConfigError) as error:
        parse_flags([own_file(line)])
    assert named in one_line(error)
    assert "Traceback" not in one_line(error)


@pytest.mark.parametrize("content", ["", "x = 1\n", "def get_config():\n    pass\n"])
def test_a_file_that_gives_no_configuration_is_named(tmp_path, content):
    path = tmp_path / "own.py"
    path.write_text(content, encoding="utf-8")
    parse(TINY)  # What was read before must not stand in for it.
    with pytest.raises(ConfigError) as error:
        parse_flags([f"--config={path}"])
    assert "own.py" in one_line(error)


# ---- Fields ----


def test_the_default_configuration_has_its_own_fields():
    assert parse_config(default_config()).to_dict() == default_config().to_dict()


@pytest.mark.parametrize(
    ("section", "field", "value", "named"),
    [
        ("optimizer", "learning_rate", "1e-4", "config.optimizer.learning_rate='1e-4' must be of"),
        ("optimizer", "learning_rate", True, "config.optimizer.learning_rate=True must be of"),
        ("data", "group_size", 2.0, "config.data.group_size=2.0 must be of type int"),
        ("mesh", "tensor", True, "config.mesh.tensor=True must be of type int"),
        ("evaluation", "enabled", 1, "config.evaluation.enabled=1 must be of type bool"),
        ("evaluation", "batch_size", 0, "config.evaluation.batch_size=0 must be at least 1"),
        ("evaluation", "every_steps", -1, "config.evaluation.every_steps=-1 must be at least 0"),
        ("optimizer", "learning_rate", -1e-5, "config.optimizer.learning_rate=-1e-05 must be"),
        ("optimizer", "beta2", 1.0, "config.optimizer.beta2=1.0 must be from 0 to below 1"),
        ("optimizer", "epsilon", 0.0, "config.optimizer.epsilon=0.0 must be positive"),
        ("loss", "generative_weight", -0.1, "config.loss.generative_weight=-0.1 must be at least"),
    ],
)
def test_a_value_of_the_wrong_type_or_size_names_its_field(section, field, value, named):
    config = default_config().to_dict()
    config[section][field] = value
    with pytest.raises(ConfigError) as error:
        parse_config(ConfigDict(config))
    assert named in one_line(error)


def test_a_whole_number_will_do_for_a_float():
    config = default_config().to_dict()
    config["optimizer"]["weight_decay"] = 0
    decay = parse_config(ConfigDict(config)).optimizer.weight_decay
    assert decay == 0 and type(decay) is float


def test_a_section_that_is_a_number_names_itself():
    with pytest.raises(ConfigError, match=r"config\.loss must be a section, not 3"):
        parse_config(ConfigDict(default_config().to_dict() | {"loss": 3}))


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--config.model.sizes.hidden_size=0", "hidden_size"),
        ("--config.model.sizes.num_key_value_heads=5", "num_key_value_heads=5"),
        ("--config.model.dtype=float64", "config.model.dtype='float64'"),
        ("--config.model.param_dtype=float16", "config.model.param_dtype='float16'"),
        ("--config.model.remat=some", "config.model.remat='some'"),
        ("--config.model.splash_block_size=500", "splash_block_size=500 must be a multiple of 128"),
        ("--config.model.attention_implementation=flash", "attention_implementation='flash' must"),
        ("--config.model.architecture=llama", "config.model.architecture='llama'"),
        ("--config.model.pooling=max", "config.model.pooling='max'"),
        ("--config.model.attention=bbcb", "config.model.attention='bbcb' must be one of bbcc, c"),
        ("--config.model.attention=bbbc", "generation must be causal"),
        ("--config.model.attention=bccc", "a bidirectional instruction would leak"),
        ("--config.model.attention=bb", "four letters"),
        ("--config.loss.generative_reduction=sum", "config.loss.generative_reduction='sum'"),
        ("--config.loss.temperature=0", "config.loss.temperature=0"),
        ("--config.optimizer.warmup_ratio=1.5", "config.optimizer.warmup_ratio"),
        ("--config.optimizer.warmup_ratio=-0.1", "config.optimizer.warmup_ratio"),
        (
            "--config.optimizer.max_grad_norm=0",
            "config.optimizer.max_grad_norm=0.0 must be positive",
        ),
        ("--config.optimizer.mu_dtype=int8", "config.optimizer.mu_dtype='int8' must be"),
    ],
)
def test_an_impossible_model_loss_or_optimizer_names_its_field(flag, named):
    with pytest.raises(ConfigError) as error:
        make_trainer(parse(TINY, flag))
    assert named in one_line(error)


@pytest.mark.parametrize(
    "size", ["num_local_experts", "hidden_sise", "dtype", "lora", "linear_dtype"]
)
def test_a_size_that_the_architecture_does_not_have_is_named(own_file, size):
    flag = own_file(f"config.model.sizes = {{{size!r}: 4}}")
    with pytest.raises(ConfigError, match=size):
        model_config(parse(flag))


@pytest.mark.parametrize(
    ("size", "value", "wanted"),
    [
        ("hidden_size", 256.0, "int"),
        ("hidden_size", "256", "int"),
        ("num_hidden_layers", True, "int"),
        ("rms_norm_eps", "1e-5", "float"),
        ("tie_word_embeddings", 1, "bool"),
        ("sliding_window", 4.5, r"int \| None"),
    ],
)
def test_a_size_of_the_wrong_type_is_named(own_file, size, value, wanted):
    config = parse(own_file(f"config.model.sizes = {{{size!r}: {value!r}}}"))
    with pytest.raises(
        ConfigError, match=f"^config.model.sizes.{size}={value!r} must be of type {wanted}$"
    ):
        model_config(config)


def test_some_layers_may_have_a_sliding_window():
    def layer_types(*types, window=""):
        flag = f"--config.model.sizes.layer_types={types}"
        return model_config(parse(TINY, flag, *window.split())).layer_types

    window = "--config.model.sizes.sliding_window=4"
    types = ("full_attention", "sliding_attention")
    assert layer_types(*types, window=window) == types
    with pytest.raises(ConfigError, match="layer_types has 'sliding_attention': set "):
        layer_types(*types)
    with pytest.raises(ConfigError, match="must be a list of 'sliding_attention' and 'full_atten"):
        layer_types("local", "global", window=window)


def test_a_mixtral_may_go_without_the_loss_of_its_router():
    def coefficient(value):
        flag = f"--config.model.sizes.router_aux_loss_coef={value}"
        config = parse(TINY, "--config.model.architecture=mixtral", flag)
        return model_config(config).router_aux_loss_coef

    assert coefficient(0) == 0
    with pytest.raises(ConfigError, match="router_aux_loss_coef must be positive, not -1"):
        coefficient(-1)


@pytest.mark.parametrize(
    ("schedule", "halfway"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)]
)
def test_schedules_of_the_learning_rate(schedule, halfway):
    rate = learning_rate_schedule(0.1, 0.2, 100, schedule)
    np.testing.assert_allclose([rate(0), rate(10), rate(20)], [0, 0.05, 0.1], atol=1e-8)
    np.testing.assert_allclose(rate(60), 0.1 * halfway, rtol=1e-5)
    np.testing.assert_allclose(rate(100), 0.1 if schedule == "constant" else 0.0, atol=1e-8)


def test_an_unknown_schedule_is_named():
    with pytest.raises(ConfigError, match=r"config\.optimizer\.schedule='square' must be one of"):
        parse(TINY, "--config.optimizer.schedule=square")


def test_the_fields_that_a_continued_run_changes_are_listed():
    now = parse(TINY, "--config.optimizer.mu_dtype=bfloat16", "--config.loss.temperature=0.1")
    before = parse(TINY).to_dict()
    before["optimizer"]["moment_dtype"] = before["optimizer"].pop("mu_dtype")  # Its former name.
    del before["seed"]  # As if it were a new field.
    assert changed_fields(before, now.to_dict()) == [
        "config.loss.temperature: 0.05 -> 0.1",
        "config.optimizer.mu_dtype: 'float32' -> 'bfloat16'",
    ]


# ---- Weights to start from ----


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--config.model.weights=nowhere"], ["config.model.weights", "nowhere does not exist"]),
        ([f"--config.model.weights={'long' * 99}"], ["config.model.weights", "too long"]),
        (
            [f"--config.model.weights={TINY_MODELS / 'tiny-mixtral'}"],
            ["config.model.architecture='mistral'", "tiny-mixtral"],
        ),
        (
            [
                f"--config.model.weights={TINY_MODELS / 'tiny-mistral'}",
                "--config.model.architecture=llama",
            ],
            ["config.model.architecture='llama', but the architecture of", "is 'mistral'"],
        ),
        (
            [
                f"--config.model.weights={TINY_MODELS / 'tiny-mistral'}",
                "--config.model.sizes.hidden_size=64",
            ],
            ["config.model.sizes.hidden_size=64", "tiny-mistral has 32"],
        ),
        (
            ["--config.model.weights=", "--config.lora.rank=8"],
            ["config.lora.rank=8 needs config.model.weights"],
        ),
        (
            [
                f"--config.model.weights={TINY_MODELS / 'tiny-mistral'}",
                "--config.lora.rank=8",
                "--config.lora.targets=attention.*,mlp.*",
            ],
            ["'mlp.*' matches no linear layer", "feed_forward.gate, feed_forward.up"],
        ),
        (
            [f"--config.model.weights={TINY_MODELS / 'tiny-mistral'}", "--config.lora.rank=-1"],
            ["config.lora.rank=-1 must be positive"],
        ),
    ],
)
def test_weights_that_cannot_be_started_from(flags, named):
    config = parse(config_flag("gritlm_7b"), *flags)
    with pytest.raises(ConfigError) as error:
        make_trainer(config, open_pretrained(config))
    for words in named:
        assert words in one_line(error)


def test_training_starts_from_given_weights():
    folder = TINY_MODELS / "tiny-mistral"
    config = parse(config_flag("gritlm_7b"), f"--config.model.weights={folder}")
    pretrained = open_pretrained(config)
    trainer = make_trainer(config, pretrained)
    assert trainer.model_config.sliding_window == 64
    state = trainer.state_from(pretrained.load, config.seed)
    expected = reference_values.load_model("mistral").embedding[...]
    np.testing.assert_array_equal(state.parameters["embedding"][...], expected)
    at_random = trainer.initial_state(0)
    assert jax.tree.structure(state) == jax.tree.structure(at_random)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(at_random), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


def test_low_rank_updates_are_of_all_layers_but_the_router_and_not_in_config_json():
    for name, config in (("mistral", "gritlm_7b"), ("mixtral", "gritlm_8x7b")):
        weights = f"--config.model.weights={TINY_MODELS / f'tiny-{name}'}"
        config = parse(config_flag(config), weights, "--config.mesh.expert=1")
        plain = model_config(config, open_pretrained(config))
        assert plain.lora is None
        config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=4))
        adapted = model_config(config, open_pretrained(config))
        layers = linear_layers(weights_of(adapted))
        assert set(layers) - set(lora_layers(adapted)) <= {"feed_forward.router"}
        assert config_to_hugging_face(adapted) == config_to_hugging_face(plain)
        assert "lora" not in config.model.sizes


def test_a_projection_of_another_size_than_the_weights_have():
    pretrained = open_pretrained(
        parse(config_flag("gritlm_7b"), f"--config.model.weights={TINY_MODELS / 'tiny-mistral'}")
    )
    pretrained.config = dataclasses.replace(pretrained.config, embedding_projection_size=12)
    config = parse(config_flag("gritlm_7b"), "--config.model.embedding_projection_size=7")
    with pytest.raises(ConfigError, match=r"embedding_projection_size=7, but .* projection to 12"):
        model_config(config, pretrained)


def test_what_the_given_weights_lack_starts_at_random():
    folder = TINY_MODELS / "tiny-mistral"
    config = parse(
        config_flag("gritlm_7b"),
        f"--config.model.weights={folder}",
        "--config.model.embedding_projection_size=12",
    )
    pretrained = open_pretrained(config)
    trainer = make_trainer(config, pretrained)
    state = trainer.state_from(pretrained.load, seed=3)
    at_random = trainer.initial_state(3).parameters
    projection = state.parameters["embedding_projection"]["weight"][...]
    assert projection.shape == (trainer.model_config.hidden_size, 12)
    np.testing.assert_array_equal(projection, at_random["embedding_projection"]["weight"][...])
    expected = reference_values.load_model("mistral").embedding[...]
    np.testing.assert_array_equal(state.parameters["embedding"][...], expected)


def test_data_that_two_tokenizers_made_are_refused(prepared_sample, tmp_path):
    folder = shutil.copytree(prepared_sample, tmp_path / "sample")
    manifest = next(folder.glob("*chat*/train/manifest.json"))
    content = json.loads(manifest.read_text())
    content["tokenizer"]["sha256"] = "another"
    manifest.write_text(json.dumps(content))
    config = parse(TINY, f"--config.data.folder={folder}")
    with pytest.raises(PreparedDataError, match=r"different tokenizers: prepare them again"):
        make_batches(config, make_trainer(config))


def test_data_of_another_tokenizer_than_the_weights_have_are_refused(prepared_sample, tmp_path):
    folder = shutil.copytree(TINY_MODELS / "tiny-mistral", tmp_path / "model")
    config = parse(TINY, f"--config.data.folder={prepared_sample}")
    batches = make_batches(config, make_trainer(config))

    def check():
        check_tokenizer(batches, open_pretrained(parse(TINY, f"--config.model.weights={folder}")))

    check_tokenizer(batches, None)
    with pytest.raises(PreparedDataError, match="are of another model and have no tokenizer"):
        check()
    path = write_tokenizer(folder, "smollm", size=300)
    with pytest.raises(PreparedDataError, match=rf"again with --tokenizer {folder}$"):
        check()
    path.write_text("{}")
    check()  # It cannot be read.
    path.unlink()
    for name, content in Tokenizer().files.items():
        (folder / name).write_bytes(content)
    check()


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--config.model.sizes.num_attention_heads=3", "config.model.sizes.num_attention_heads=3"),
        ("--config.mesh.fsdp=3", "fsdp=3"),
        ("--config.data.folder=nowhere", "nowhere/sample_embedding.json"),
        ("--config.data.query_row_length=16", "config.data.query_row_length=16"),
        ("--config.model.sizes.vocab_size=1000", "vocab_size=1000"),
        ("--config.model.attention_implementation=cudnn", "float32"),
    ],
)
def test_a_mistake_about_data_or_devices_is_named_before_anything_is_compiled(
    prepared_sample, tmp_path, flag, named
):
    workdir = tmp_path / "run"
    config = parse(TINY, f"--config.data.folder={prepared_sample}", flag)
    with pytest.raises((ConfigError, MeshError, PreparedDataError)) as error:
        run(config, epath.Path(workdir))
    assert named in one_line(error)
    assert not workdir.exists()


def test_the_best_checkpoint_is_kept_by_what_is_measured(prepared_sample):
    def held_out(best):
        config = parse(
            TINY,
            f"--config.data.folder={prepared_sample}",
            "--config.evaluation.every_steps=50",
            f"--config.checkpoint.best_metric={best}",
        )
        return make_held_out(config, make_trainer(config))

    assert held_out("wordnet_senses/ndcg_at_10") and held_out("perplexity")
    with pytest.raises(ConfigError, match=r"best_metric='ndcg' must be one of .*, perplexity"):
        held_out("ndcg")


def test_attention_that_serves_the_rows_of_training_alone_is_refused(prepared_sample):
    config = parse(
        TINY,
        f"--config.data.folder={prepared_sample}",
        "--config.mode=embedding",
        "--config.model.attention_implementation=splash",
        "--config.data.row_length_multiple=128",
        "--config.data.query_row_length=200",  # Training takes 128, measuring all of it.
    )
    trainer = make_trainer(config)
    batches = make_batches(config, trainer)
    assert {shape["query"].length for shape in batches.shapes} == {128}
    check_attention(trainer, batches, None)
    with pytest.raises(ConfigError, match="does not support rows of 200 positions"):
        check_attention(trainer, batches, make_held_out(config, trainer))
