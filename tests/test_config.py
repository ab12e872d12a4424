"""The configurations of the paper's runs, and what a mistake in one is answered with."""

from pathlib import Path

from flax import nnx
import jax
import pytest

from grit_jax.config import ConfigError, check_fields
from grit_jax.config_flags import parse_flags
from grit_jax.run import loss_config, model_config
from grit_jax.training.train_step import make_model

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
MISTRAL_7B, MIXTRAL_8X7B = 7_241_732_096, 46_702_792_704
TINY = f"--config={CONFIGS[0].with_name('gritlm_tiny.py')}"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gritlm_7b", MISTRAL_7B),
        ("gritlm_8x7b", MIXTRAL_8X7B),
        ("embedding_7b", MISTRAL_7B),
        ("generative_7b", MISTRAL_7B),
        ("gritlm_tiny", 8_356_224),
    ],
)
def test_each_model_has_the_parameters_of_the_original(name, parameters):
    path = CONFIGS[0].with_name(f"{name}.py")
    config, workdir = parse_flags([f"--config={path}"])
    assert workdir == f"runs/{name}"
    model = nnx.eval_shape(lambda: make_model(model_config(config), 0))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters
    loss_config(config)


def test_every_configuration_is_short_and_checked_here():
    assert {path.stem for path in CONFIGS} == {
        "embedding_7b",
        "generative_7b",
        "gritlm_7b",
        "gritlm_8x7b",
        "gritlm_tiny",
    }
    assert all(len(path.read_text().splitlines()) < 120 for path in CONFIGS)


def test_a_size_that_the_file_leaves_out_can_be_set():
    path = CONFIGS[0].with_name("gritlm_7b.py")
    config, _ = parse_flags(
        [
            f"--config={path}",
            "--config.model.sizes.num_hidden_layers=4",
            "--config.model.sizes.sliding_window=4096",
        ]
    )
    assert model_config(config).num_hidden_layers == 4
    assert model_config(config).sliding_window == 4096


def test_overrides_reach_the_configuration():
    config, workdir = parse_flags(
        [
            TINY,
            "--config.optimizer.learning_rate=1e-4",
            "--config.model.sizes.hidden_size=64",
            "--config.mesh.tensor=2",
            "--workdir=elsewhere",
        ]
    )
    assert config.optimizer.learning_rate == 1e-4
    assert model_config(config).hidden_size == 64
    assert config.mesh.tensor == 2 and workdir == "elsewhere"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--config=FILE is missing"),
        (["--config=configs/nowhere.py"], "configs/nowhere.py"),
        ([TINY, "--config.optimizer.learning_rat=1"], "learning_rat"),
        ([TINY, "--config.stepss=1"], "stepss"),
        ([TINY, "--config.steps=abc"], "steps"),
        ([TINY, "--config.optimizer.learning_rate=abc"], "learning_rate"),
        ([TINY, "--config.steps=0"], "config.steps=0 must be at least 1"),
        ([TINY, "--config.mode=both"], "config.mode='both'"),
        ([TINY, "--config.grad_cache_chunks=4"], "config.grad_cache_chunks"),
        ([TINY, "--wokdir=x"], "wokdir"),
        ([TINY, "resume"], "'resume'"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_in_one_line(arguments, named):
    with pytest.raises(ConfigError) as caught:
        parse_flags(arguments)
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_mistake_in_a_file_is_named_with_what_was_meant(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from grit_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.optimizer.learning_rte = 1.0\n"
        "    return config\n"
    )
    with pytest.raises(ConfigError, match=r"learning_rte.*did you mean .*learning_rate"):
        parse_flags([f"--config={path}"])


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("architecture", "gpt", "config.model.architecture='gpt'"),
        ("pooling", "max", "config.model.pooling='max'"),
        ("attention", "bbcb", "config.model.attention='bbcb'"),
        ("remat", "some", "config.model.remat='some'"),
        ("dtype", "float16", "config.model.dtype='float16'"),
        ("sizes", {"hidden_sise": 1}, "hidden_sise"),
        ("sizes", {"num_key_value_heads": 5}, "num_key_value_heads=5"),
        ("sizes", {"vocab_size": 0}, "config.model.vocab_size must be positive"),
    ],
)
def test_an_impossible_model_is_named(field, value, named):
    config, _ = parse_flags([TINY])
    with config.unlocked():
        config.model[field] = value
    check_fields(config.to_dict())
    make = loss_config if field in ("pooling", "attention") else model_config
    with pytest.raises(ConfigError) as caught:
        make(config)
    assert named in str(caught.value)
