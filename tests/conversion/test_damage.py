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
        (lambda tensors: tensors.pop("lm_head.weight"), ["lm_head.weight", "--head"]),
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


@pytest.mark.parametrize("prefix", ["model.", None])
def test_names_of_the_originals_trainer_and_of_a_bare_model(folder, prefix):
    def rename(tensors):
        renamed = {
            f"{prefix}{name}" if prefix else name.removeprefix("model."): tensor
            for name, tensor in tensors.items()
            if prefix or name != "lm_head.weight"
        }
        tensors.clear()
        tensors.update(renamed)

    base = folder.with_name("base")
    shutil.copytree(folder, base)
    expected = HuggingFaceModel(base)
    change(folder, rename)
    model = HuggingFaceModel(folder, None if prefix else base)
    for parameter in model.parameters:
        index = tuple(slice(0, size) for size in parameter.full_shape)
        np.testing.assert_array_equal(model.read(parameter, index), expected.read(parameter, index))
    if not prefix:
        tied = HuggingFaceModel(folder, "tied")
        assert tied.config.tie_word_embeddings
        assert "head" not in {parameter.path[0] for parameter in tied.parameters}
        with pytest.raises(ConversionError, match="leave out --head"):
            HuggingFaceModel(base, "tied")


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
