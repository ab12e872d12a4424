"""LoRA adapters in PEFT's format, read and written, against peft itself."""

import dataclasses
import json
import shutil

from flax import nnx
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tokenizer_files import write_tokenizer

from grit_jax.cli import main
from grit_jax.config import ConfigError
from grit_jax.config_flags import parse_flags
from grit_jax.conversion import ConversionError, open_model
from grit_jax.conversion.stored_tokenizer import find_tokenizer
from grit_jax.from_config import make_trainer, open_adapter
from grit_jax.inference.loading import load_module
from grit_jax.models import LoraConfig, make_model
from grit_jax.sharding import make_mesh

SIZES = {
    "vocab_size": 90,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BASES = {
    "mistral": ("Mistral", {}),
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
}
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Settings of adapters, by the base and what is special about them.
ADAPTERS = {
    "mistral": ("mistral", {"target_modules": DENSE}),
    "llama": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "qwen2": ("qwen2", {"target_modules": DENSE, "bias": "all"}),
    "qwen3": (
        "qwen3",
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 4, "up_proj": 2},
            "alpha_pattern": {r".*\.1\.mlp\.up_proj": 40},
        },
    ),
    "mixtral": ("mixtral", {"target_modules": DENSE[:4], "target_parameters": STACKED}),
    "router": ("mixtral", {"target_parameters": ["mlp.gate.weight", STACKED[1]]}),
    "one layer": ("mistral", {"target_modules": ["v_proj"], "layers_to_transform": [1]}),
    "saved": ("mistral", {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]}),
    "embedding model": ("mistral", {"target_modules": DENSE}),
}


def make_base(name, **fields):
    import torch
    import transformers

    kind, own = BASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | own | fields)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of the base models."""
    root = tmp_path_factory.mktemp("bases")
    for name in BASES:
        make_base(name).save_pretrained(root / name)
    return {name: root / name for name in BASES}


def randomize(model):
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter += 0.2 * torch.randn_like(parameter)


@pytest.fixture(scope="session", params=ADAPTERS)
def adapter(request, bases, tmp_path_factory):
    """The adapter's folder, and the folder of the model that peft merges."""
    import peft
    import transformers

    base, settings = ADAPTERS[request.param]
    is_bare = request.param == "embedding model"
    auto = transformers.AutoModel if is_bare else transformers.AutoModelForCausalLM
    model = peft.get_peft_model(
        auto.from_pretrained(bases[base]), peft.LoraConfig(r=3, lora_alpha=5, **settings)
    )
    randomize(model)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder / "adapter", save_embedding_layers=request.param == "saved")
    model.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "adapter", folder / "merged"


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def content(model):
    return {
        p.path: model.read(p, tuple(slice(0, n) for n in p.full_shape)) for p in model.parameters
    }


def test_merged_weights_equal_pefts(adapter):
    folder, merged = adapter
    ours, theirs = content(open_model(folder)), content(open_model(merged))
    for path, expected in theirs.items():
        np.testing.assert_allclose(ours[path], expected, atol=1e-6, err_msg=".".join(path))


def save_run(base, folder, **lora):
    """Saves a checkpoint of a LoRA run with random matrices; returns its folder."""
    lora = {"rank": 3, "alpha": 5.0, "targets": "*", **lora}
    config = dataclasses.replace(base.config, lora=LoraConfig(**lora))
    shapes = nnx.to_pure_dict(
        nnx.state(nnx.eval_shape(lambda: make_model(config, 0)), nnx.LoRAParam)
    )
    random = np.random.default_rng(0)
    arrays = jax.tree.map(lambda x: 0.3 * random.normal(size=x.shape).astype(np.float32), shapes)
    items = {
        "model_config": base.fields,
        "description": {"lora": {**lora, "base": base.weights_fingerprint()}},
        "base_model": {"folder": str(base.folder)},
    }
    ocp.Checkpointer(ocp.CompositeCheckpointHandler()).save(
        folder,
        ocp.args.Composite(
            parameters=ocp.args.StandardSave(arrays),
            **{name: ocp.args.JsonSave(item) for name, item in items.items()},
        ),
    )
    return folder


@pytest.mark.slow
# PEFT checks the ranks of experts, which it stacks, against its list of modules.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("name", BASES)
def test_peft_loads_an_export_as_the_adapted_model(bases, tmp_path, name):
    import peft
    import torch
    import transformers

    run = save_run(open_model(bases[name]), tmp_path / "run")
    main(["convert", "to-hf", str(run), str(tmp_path / "adapter"), "--adapter"])
    base = transformers.AutoModelForCausalLM.from_pretrained(bases[name], dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, 12))
    full = torch.ones(2, 1, 12, 12, dtype=torch.bool)

    def their_states(model, mask):
        with torch.no_grad():
            return model(torch.tensor(tokens), attention_mask=mask, output_hidden_states=True)

    without = their_states(base, full).logits.numpy()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    ours = load_module(open_model(run), "float32", make_mesh(devices=jax.devices()[:1]))

    @jax.jit
    def our_states(tokens):
        hidden = [ours(tokens, is_causal=is_causal) for is_causal in (False, True)]
        return [(states, ours.logits(states)) for states in hidden]

    masks = (full, full.tril())
    for mask, (hidden, logits) in zip(masks, our_states(tokens), strict=True):
        expected = their_states(theirs, mask)
        assert_close(hidden, expected.hidden_states[-1].numpy())
        assert_close(logits, expected.logits.numpy())
    assert np.abs(without - their_states(theirs, full).logits.numpy()).max() > 0.1
    again = content(open_model(tmp_path / "adapter"))
    for path, merged in content(open_model(run)).items():
        np.testing.assert_allclose(again[path], merged, atol=1e-6)


def change(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def mistral_adapter(bases, tmp_path):
    """The adapter of a LoRA run of a Mistral."""
    run = save_run(open_model(bases["mistral"]), tmp_path / "run", targets="attention.*")
    main(["convert", "to-hf", str(run), str(tmp_path / "adapter"), "--adapter"])
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not supported"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices=.* is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"init_lora_weights": "pissa"}, "'pissa' has changed the base model's weights"),
        ({"r": None}, "does not describe a LoRA adapter"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "/gone"}, r"adapter of /gone: .* with base= \(--base\)"),
    ],
)
def test_settings_that_are_refused_by_name(mistral_adapter, fields, message):
    change(mistral_adapter, **fields)
    with pytest.raises(ConversionError, match=message):
        open_model(mistral_adapter)


def test_an_adapter_with_another_base(mistral_adapter, bases, tmp_path):
    expected = content(open_model(mistral_adapter))
    moved = shutil.copytree(bases["mistral"], tmp_path / "moved")
    change(mistral_adapter, base_model_name_or_path="someone/gone")
    for path, merged in content(open_model(mistral_adapter, base=moved)).items():
        np.testing.assert_array_equal(merged, expected[path])
    make_base("mistral", hidden_size=24).save_pretrained(tmp_path / "wide")
    with pytest.raises(ConversionError, match="does not have: name the base model that"):
        open_model(mistral_adapter, base=tmp_path / "wide")
    (mistral_adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ConversionError, match="but no adapter_model"):
        open_model(mistral_adapter, base=moved)


def test_an_adapter_keeps_how_its_model_embeds_and_its_tokenizer(tmp_path):
    import transformers

    base = tmp_path / "base"
    make_base("mistral", vocab_size=400).save_pretrained(base)
    write_tokenizer(base, "gpt2", size=400)
    run = save_run(open_model(base), tmp_path / "run", targets="attention.key")
    options = ["--pooling", "lasttoken", "--attention", "cccc", "--query-instruction", "Find it"]
    main(["convert", "to-hf", str(run), str(tmp_path / "adapter"), "--adapter", *options])
    stored = open_model(tmp_path / "adapter")
    assert stored.fields["grit"]["pooling"] == "lasttoken"
    assert stored.fields["grit"]["attention"] == "cccc"
    assert "Find it" in stored.fields["grit"]["query_prompt"]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "adapter")
    messages = [{"role": "user", "content": "Who are you?"}]
    assert theirs.apply_chat_template(messages, tokenize=False).endswith("Who are you?\n")
    ours = find_tokenizer(stored)
    assert ours is not None
    assert theirs("Find it", add_special_tokens=False)["input_ids"] == ours.encode("Find it")


def test_adapters_that_peft_cannot_hold(bases, tmp_path, capsys):
    run = save_run(open_model(bases["mixtral"]), tmp_path / "run", targets="feed_forward.gate")
    for source, message in ((run, "which PEFT adapts together"), (bases["llama"], "not a LoRA")):
        with pytest.raises(SystemExit):
            main(["convert", "to-hf", str(source), str(tmp_path / "adapter"), "--adapter"])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "adapter").exists()


def training_config(base, adapter, **lora):
    lora = {"rank": 3, "alpha": 5.0, "targets": "attention.*", **lora}
    return parse_flags(
        [
            "--config=configs/gritlm_7b.py",
            f"--config.model.weights={base}",
            f"--config.lora.adapter={adapter}",
            *(f"--config.lora.{name}={value}" for name, value in lora.items()),
        ]
    )[0]


def test_a_run_starts_from_an_adapter(mistral_adapter, bases):
    config = training_config(bases["mistral"], mistral_adapter)
    base = open_model(bases["mistral"])
    trainer = make_trainer(config, base, jax.devices()[:1])
    adapter = open_adapter(config, trainer, base)
    with jax.default_prng_impl("rbg"):  # Compiled in a fifth of the time.
        state = trainer.state_from(adapter.load_unmerged, seed=0)
    arrays = nnx.to_pure_dict(state.parameters)["layers"]["attention"]
    assert set(arrays) == {f"{name}_lora" for name in ("query", "key", "value", "output")}
    for parameter in base.parameters:
        if parameter.path in adapter.adapted:
            update = adapter.update(parameter)
            ours = arrays[f"{parameter.path[-1]}_lora"]
            np.testing.assert_array_equal(ours["a"], update.a)
            np.testing.assert_array_equal(ours["b"], update.b)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4}, "set config.lora.rank=3, config.lora.alpha=5 and config.lora.targets=att"),
        ({"alpha": 6.0}, "has other settings"),
        ({"targets": "*"}, "has other settings"),
    ],
)
def test_a_run_has_the_settings_of_its_adapter(mistral_adapter, bases, lora, message):
    config = training_config(bases["mistral"], mistral_adapter, **lora)
    base = open_model(bases["mistral"])
    with pytest.raises(ConfigError, match=message):
        open_adapter(config, make_trainer(config, base, jax.devices()[:1]), base)
