"""Errors name the damaged file of a model, and a failed conversion leaves no files behind."""

import json
import shutil

from command_line import MAIN, assert_fails_in_one_line, run_python, with_full_disk
import numpy as np
import pytest
import reference_values
from safetensors.numpy import load_file, save_file
from tokenizer_files import write_tokenizer

from grit_jax import GritLM
from grit_jax.conversion import ConversionError, HuggingFaceModel, open_model
from grit_jax.conversion.export import write_hugging_face
from grit_jax.conversion.orbax_model import write_orbax
from grit_jax.conversion.stored_model import ConversionWarning
from grit_jax.models import config_from_hugging_face, config_to_hugging_face
from grit_jax.text.tokenizer_files import read_tokenizer_files

WEIGHTS = "model.safetensors"


@pytest.fixture(params=["mistral", "mixtral"])
def folder(request, tmp_path):
    """A copy of a tiny model to damage."""
    copy = tmp_path / request.param
    shutil.copytree(reference_values.FOLDER / f"tiny-{request.param}", copy)
    return copy


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


QUERY = "model.layers.1.self_attn.q_proj.weight"
LORA = "model.layers.1.self_attn.q_proj.lora_A.default.weight"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda tensors: tensors.pop(QUERY), ["lacks 1", QUERY]),
        (lambda tensors: tensors.update(extra=np.zeros(3)), ["unknown 1", "extra"]),
        (
            lambda tensors: tensors.update({QUERY: tensors[QUERY][:-1].copy()}),
            [WEIGHTS, QUERY, "(31, 32)", "(32, 32)"],
        ),
        (
            lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(np.int8)}),
            [WEIGHTS, QUERY, "I8"],
        ),
        (lambda tensors: tensors.update({f"module.{QUERY}": tensors[QUERY]}), ["both hold", QUERY]),
        (
            lambda tensors: tensors.update({f"base_model.model.{LORA}": np.zeros((2, 32))}),
            [LORA, "merge_and_unload()"],
        ),
        (
            lambda tensors: tensors.update({f"backbone.{QUERY}": tensors.pop(QUERY)}),
            ["lacks 1", f"unknown 1 tensors: backbone.{QUERY}"],
        ),
    ],
)
def test_wrong_tensors(folder, edit, named):
    change(folder, edit)
    with pytest.raises(ConversionError) as error:
        HuggingFaceModel(folder)
    for word in [*named, str(folder)]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "gemma"}, "gemma"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"num_attention_heads": 3}, "num_attention_heads=3"),
    ],
)
def test_wrong_configurations(folder, fields, named):
    change_config(folder, **fields)
    with pytest.raises(ConversionError, match=r"config\.json") as error:
        HuggingFaceModel(folder)
    assert named in str(error.value)


def test_a_file_cut_off_and_files_missing(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConversionError, match=f"{WEIGHTS} is damaged or cut off"):
        HuggingFaceModel(folder)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ConversionError, match=f"{WEIGHTS} is a placeholder .*: git lfs pull"):
        HuggingFaceModel(folder)
    path.unlink()
    with pytest.raises(ConversionError, match=r"neither model\.safetensors nor"):
        HuggingFaceModel(folder)
    (folder / "consolidated.00.safetensors").write_bytes(b"")
    with pytest.raises(ConversionError, match=r"Mistral's own format"):
        HuggingFaceModel(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x05")
    with pytest.raises(ConversionError, match=r"pytorch_model.bin is a pickle.*save_pretrained"):
        HuggingFaceModel(folder)
    index = {"weight_map": {QUERY: "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"model-00002-of-00002.safetensors is missing"):
        HuggingFaceModel(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config.json is not JSON"):
        HuggingFaceModel(folder)


def test_shards_and_their_index(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    # Mistral's own copy of the weights, and a file that the index does not name.
    save_file({"x": np.zeros(1)}, folder / "consolidated.safetensors")
    save_file({QUERY: tensors[QUERY] + 1}, folder / "old.safetensors")
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for number, (name, tensor) in enumerate(tensors.items()):
        shards["ab"[number % 2] + ".safetensors"][name] = tensor

    def write(index_of):
        for file, shard in shards.items():
            save_file(shard, folder / file)  # Without the metadata {"format": "pt"}.
        index = {name: file for file, shard in shards.items() for name in shard}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": index | index_of})
        )

    write({})
    model = HuggingFaceModel(folder)
    (query,) = (p for p in model.parameters if p.path[-1] == "query")
    read = model.read(query, tuple(slice(0, size) for size in query.full_shape))
    np.testing.assert_array_equal(query.to_tensor(read[1]), tensors[QUERY])
    write({"lm_head.scale": "a.safetensors"})
    with pytest.raises(
        ConversionError, match=r"names 1 tensors that are in no file.*lm_head.scale"
    ):
        HuggingFaceModel(folder)
    for shard in shards.values():
        shard[QUERY] = tensors[QUERY]
    write({})
    with pytest.raises(ConversionError, match=f"a.safetensors .*b.safetensors .*both hold {QUERY}"):
        HuggingFaceModel(folder)


def test_layers_of_several_types_are_read_as_float32(folder):
    expected = load_file(folder / WEIGHTS)[QUERY].astype(np.float16).astype(np.float32)
    change(folder, lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(np.float16)}))
    model = HuggingFaceModel(folder)
    (query,) = (p for p in model.parameters if p.path[-1] == "query")
    read = model.read(query, (slice(1, 2), *(slice(0, size) for size in query.full_shape[1:])))
    assert read.dtype == model.dtype(query) == np.float32
    np.testing.assert_array_equal(query.to_tensor(read[0]), expected)


def test_an_adapter_is_named(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(ConversionError, match=r"a PEFT adapter of some/base.*Name its base"):
            open_model(adapter)
        with pytest.raises(ConversionError, match=r"adapter_model.safetensors is damaged"):
            open_model(adapter, base=folder)
        shutil.copy(folder / "config.json", adapter)  # Some trainers save it next to an adapter.
    shutil.copy(adapter / "adapter_config.json", folder)
    with pytest.warns(ConversionWarning, match="the adapter beside the weights is not read"):
        open_model(folder)


def test_a_name_on_the_hub_is_looked_up_in_its_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub" / "models--some--model"
    shutil.copytree(folder, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.chdir(tmp_path)
    assert open_model("some/model").folder == cached / "snapshots" / "abc"
    with pytest.raises(ConversionError, match=r"^some/other does not exist.*HF_HUB_OFFLINE"):
        open_model("some/other")
    (tmp_path / "some").mkdir()  # Then it is a path.
    with pytest.raises(ConversionError, match=r"^some/model does not exist, or is neither"):
        open_model("some/model")


def test_of_two_sets_of_weights_the_one_that_transformers_reads(saved_models, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "both"
    shutil.copytree(saved_models["mixtral"], folder)  # in several files, with an index
    tensors = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        tensors |= load_file(path)
    name = "model.norm.weight"
    save_file(tensors | {name: tensors[name] + 1}, folder / WEIGHTS, metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(folder).model.norm.weight.detach().float()
    model = open_model(folder)
    (norm,) = (p for p in model.parameters if p.path == ("norm", "scale"))
    ours = model.read(norm, (slice(None),)).astype(np.float32)
    np.testing.assert_array_equal(ours, theirs.numpy())
    assert (ours > tensors[name].astype(np.float32)).all()


@pytest.mark.parametrize(
    "rename_one",
    [
        lambda name: f"model.{name}",  # The original's trainer.
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("model.", "model.language_model."),
        lambda name: f"language_model.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}".replace("s.1.", "s.1._orig_mod."),
        None,  # Saved without its head.
    ],
)
def test_names_of_wrapped_models_and_of_a_bare_model(folder, rename_one):
    def rename(tensors):
        renamed = {
            rename_one(name) if rename_one else name.removeprefix("model."): tensor
            for name, tensor in tensors.items()
            if rename_one or name != "lm_head.weight"
        }
        tensors.clear()
        tensors.update(renamed)

    base = folder.with_name("base")
    shutil.copytree(folder, base)
    expected = HuggingFaceModel(base)
    change(folder, rename)
    model = HuggingFaceModel(folder, None if rename_one else base)
    for parameter in model.parameters:
        index = tuple(slice(0, size) for size in parameter.full_shape)
        np.testing.assert_array_equal(model.read(parameter, index), expected.read(parameter, index))
    if not rename_one:
        tied = HuggingFaceModel(folder, "tied")
        assert tied.config.tie_word_embeddings
        assert "head" not in {parameter.path[0] for parameter in tied.parameters}


def test_a_destination_is_whole_or_not_there(folder, tmp_path):
    model = HuggingFaceModel(folder)
    destination = tmp_path / "destination"
    destination.mkdir()
    with pytest.raises(ConversionError, match="destination exists already"):
        write_orbax(model, destination)
    destination.rmdir()
    with pytest.raises(ConversionError, match="does not exist"):
        open_model(destination)


def test_what_keeps_a_destination_from_being_made_is_named(tmp_path):
    source = reference_values.FOLDER / "tiny-mistral"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match=r"file/new could not be written: .*File exists"):
        write_orbax(HuggingFaceModel(source), tmp_path / "file" / "new")
    # Nothing is wrong with the destination where the tokenizer is not there.
    with pytest.raises(FileNotFoundError, match=r"tokenizer 'typo.model': no such file"):
        write_hugging_face(open_model(source), tmp_path / "new", tokenizer="typo.model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, None, f"^{QUERY} has 2 values that are NaN or infinite in .*tiny"),
        (-np.inf, "bfloat16", f"^{QUERY} has 2 values that are NaN or infinite in .*tiny"),
        (1e6, "float16", f"^{QUERY} has 2 values that are .* as float16: use --dtype bfloat16"),
    ],
)
def test_an_export_has_no_values_that_are_not_finite(folder, tmp_path, value, dtype, message):
    tiny = folder.rename(tmp_path / "tiny")
    write_tokenizer(tiny, "gpt2", size=HuggingFaceModel(tiny).config.vocab_size)
    change(tiny, lambda tensors: tensors[QUERY].flat.__setitem__(slice(2), value))
    with pytest.raises(ConversionError, match=message):
        write_hugging_face(open_model(tiny), tmp_path / "new", dtype=dtype)
    assert list(tmp_path.iterdir()) == [tiny]


@pytest.mark.parametrize("linear_dtype", [None, "int8"])
def test_weights_that_are_not_finite_are_not_loaded(folder, tmp_path, linear_dtype):
    change(folder, lambda tensors: tensors[QUERY].flat.__setitem__(0, np.nan))
    write_orbax(HuggingFaceModel(folder), tmp_path / "orbax")
    for path in (folder, tmp_path / "orbax"):
        with pytest.raises(ConversionError, match=rf"^{path} has .* in layers\.attention\.query"):
            GritLM.from_pretrained(path, linear_dtype=linear_dtype)


@pytest.mark.parametrize("write", [write_orbax, write_hugging_face])
def test_a_disk_that_is_too_small_is_named(tmp_path, monkeypatch, write):
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    model = HuggingFaceModel(reference_values.FOLDER / "tiny-mistral")
    write_tokenizer(tmp_path, "gpt2", size=model.config.vocab_size)
    model.tokenizer_files = read_tokenizer_files(tmp_path)
    with pytest.raises(ConversionError, match=f"^{tmp_path} has 0.0 GB free"):
        write(model, tmp_path / "new")


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["from-hf", "to-hf"])
def test_a_full_disk_leaves_nothing_behind(saved_models, tmp_path, direction):
    source, destination = saved_models["mistral"], tmp_path / "new" / "destination"
    if direction == "to-hf":
        write_orbax(HuggingFaceModel(source), tmp_path / "checkpoint")
        source = tmp_path / "checkpoint"

    arguments = ("convert", direction, source, destination)
    finished = run_python(with_full_disk(MAIN, 700_000), *arguments, cwd=tmp_path)
    assert_fails_in_one_line(finished, "ConversionError", str(destination))
    assert list(destination.parent.iterdir()) == []


def test_configurations_go_to_json_and_back(folder):
    fields = json.loads((folder / "config.json").read_text())
    config = config_from_hugging_face(fields)
    assert config_from_hugging_face(config_to_hugging_face(config)) == config
    newer = {name: value for name, value in fields.items() if name != "rope_theta"}
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 123.0}
    assert config_from_hugging_face(newer).rope_theta == 123.0
    assert config_from_hugging_face(fields | {"head_dim": 20}).head_dim == 20
    # What transformers leaves out has its default: for a Mistral that is a window.
    left_out = config_from_hugging_face({"model_type": fields["model_type"]})
    assert left_out.sliding_window == (4096 if fields["model_type"] == "mistral" else None)
