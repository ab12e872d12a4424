"""Pushing exports to a hub, and loading models from it by name."""

import shutil

from hub_server import TOKEN, serve_hub
import huggingface_hub.constants
import pytest

from grit_jax.cli import main
from grit_jax.conversion import open_model
from grit_jax.conversion.export import write_hugging_face

# huggingface_hub uploads large files with an old argument of httpx.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(scope="module")
def exported(saved_models, tmp_path_factory):
    """An export of the Llama."""
    folder = tmp_path_factory.mktemp("push") / "exported"
    write_hugging_face(open_model(saved_models["llama"]), folder)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running hub; what HF_ENDPOINT and HF_TOKEN set at the start of a process."""
    with serve_hub() as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_a_pushed_model_is_loaded_by_its_name(exported, hub):
    main(["push", str(exported), "someone/model", "--private"])
    assert hub.visibility == {"someone/model": "private"}
    pushed = hub.models["someone/model"]
    files = {path.relative_to(exported).as_posix(): path for path in exported.rglob("*.*")}
    assert pushed.keys() == files.keys()
    assert pushed["model.safetensors"] == files["model.safetensors"].read_bytes()
    expected = open_model(exported)
    for name in ("hf:someone/model", "someone/model"):
        loaded = open_model(name)
        assert loaded.weights_fingerprint() == expected.weights_fingerprint()
        assert loaded.tokenizer_files == expected.tokenizer_files


def fail(capsys, *arguments):
    with pytest.raises(SystemExit):
        main(["push", *map(str, arguments)])
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_not_pushed(exported, hub, tmp_path, monkeypatch, capsys):
    damaged = shutil.copytree(exported, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"cut off")
    assert "model.safetensors is damaged" in fail(capsys, damaged, "someone/model")
    assert "use OWNER/MODEL" in fail(capsys, exported, "model")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert "could not be pushed: " in fail(capsys, exported, "someone/model")
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login, or set HF_TOKEN" in fail(capsys, exported, "someone/model")
    assert hub.models == {}
