"""Runs each notebook in a clean kernel, with small settings."""

import json
import re

from command_line import ROOT, environment
import nbclient
import nbformat
import pytest
from small_run import SMALL

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ONE_DEVICE = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
# A port without a server.
NO_NETWORK = dict.fromkeys(["http_proxy", "https_proxy"], "http://127.0.0.1:9")
NO_NETWORK["HF_HUB_OFFLINE"] = "1"


def run(name, folder, settings, *values):
    """Runs a notebook in a folder; returns its output and the values of expressions."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    # TensorFlow and PyTorch are installed for the tests, but notebooks must not import them.
    no_imports = "assert not {'tensorflow', 'torch'} & sys.modules.keys()"
    show = f"print(json.dumps({{name: eval(name) for name in {values}}}))"
    notebook.cells.append(nbformat.v4.new_code_cell(f"{no_imports}\n{show}"))
    changed = environment() | ONE_DEVICE | NO_NETWORK | {"GRIT_JAX_NOTEBOOK": json.dumps(settings)}
    client = nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3")
    client.execute(cwd=str(folder), env=changed)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    printed = [output.text for output in outputs if output.get("name") == "stdout"]
    return "".join(printed[:-1]), json.loads(printed[-1])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs_and_explains_its_code(path):
    notebook = json.loads(path.read_text())
    nbformat.validate(notebook)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    # Text precedes each code cell.
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert all(
        kinds[number - 1] == "markdown" for number, kind in enumerate(kinds) if kind == "code"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_badge_opens_the_repository_that_is_installed(path):
    text = path.read_text()
    (repository,) = re.findall(r'REPOSITORY = \\"https://github.com/([^\\"]+)', text)
    (opened,) = re.findall(r"https://colab.research.google.com/github/([^)]+)", text)
    assert opened == f"{repository}/blob/main/notebooks/{path.name}"
    assert repository == "grit-jax/grit-jax"


@pytest.mark.slow
def test_embed_generate_rag(tmp_path):
    settings = {"document_tokens": [60, 240], "repeats": 1, "new_tokens": 8}
    values = ("found", "list(QUESTIONS.values())", "agreeing", "answer", "pieces", "seconds")
    (tmp_path / "rag").mkdir()
    (tmp_path / "rag" / "mine").write_text("")
    printed, found = run("embed_generate_rag", tmp_path, settings, *values)
    assert found["found"] == found["list(QUESTIONS.values())"]
    assert found["agreeing"] == len(found["found"])
    assert found["answer"] == "".join(found["pieces"])
    assert found["answer"] in printed
    assert all(len(taken) == 2 and min(taken) > 0 for taken in found["seconds"].values())
    assert (tmp_path / "rag" / "mine").exists(), "other files in the folder must stay"


@pytest.mark.slow
def test_plan_a_pod(tmp_path):
    pytest.importorskip("libtpu", reason="libtpu has no wheel for this platform")
    changes = ["--config.model.sizes.vocab_size=1024", "--config.data.embedding_batch_size=16"]
    settings = {
        "config": "configs/gritlm_tiny.py",
        "changes": changes,
        "topologies": ["v5e:2x2"],
        "tokens": {"query": 64, "passage": 64, "chat": 64},
    }
    printed, found = run("plan_a_pod", tmp_path, settings, "plans", "fitting")
    plan = found["plans"]["v5e:2x2"]
    assert plan["fits"]
    assert plan["num_chips"] == 4
    assert 0 < plan["hbm_bytes_per_chip"] < plan["hbm_limit_bytes_per_chip"]
    assert found["fitting"] == found["plans"]
    assert "GiB per chip: fits" in printed
    assert f"{plan['mfu_bound']:.1%}" in printed


@pytest.mark.slow
def test_train(tmp_path, prepared_sample):
    settings = {
        "changes": [*SMALL[1:], "--config.optimizer.learning_rate=0.01"],
        "data": str(prepared_sample),
        "steps": 12,
        "seconds": 6,
    }
    values = ("read_metrics()", "same_tokens", "max_logit_difference", "min_cosine")
    printed, found = run("train", tmp_path, settings, *values)
    lines = found["read_metrics()"]
    for name in ("embedding_loss", "generative_loss"):
        losses = [line[name] for line in lines if name in line]
        assert len(losses) == 12
        assert sum(losses[-3:]) < 0.99 * sum(losses[:3])
    assert any("held_out/wordnet_senses/recall_at_1" in line for line in lines)
    assert found["same_tokens"]
    assert found["max_logit_difference"] < 1e-3
    assert found["min_cosine"] > 0.9999
    assert "runs/train -> exported" in printed
