"""The experiment from data to tables with a small model instead of SmolLM2, and its parts."""

import argparse
import http.server
import json
from pathlib import Path
import re
import threading

from command_line import run_python
import numpy as np
import pytest
from rich.console import Console
import tokenizer_files

from experiments import claim, presets, report
from experiments.base_model import FewerLayers, make_base_model
from experiments.files import read_lines
from experiments.presets import ABLATIONS, MAIN, UNTRAINED
from experiments.smaller import write_smaller
from grit_jax.conversion import open_model
from grit_jax.conversion.orbax_model import write_orbax


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory):
    """A Llama of four layers with tied random weights, and a tokenizer like SmolLM2's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer_files.write_tokenizer(folder, "smollm", size=1000)
    return folder


def test_kept_layers_have_the_right_weights(small_llama, tmp_path):
    whole = open_model(small_llama)
    write_orbax(FewerLayers(whole, (0, 3)), tmp_path / "fewer")
    fewer = open_model(tmp_path / "fewer")
    assert fewer.config.num_hidden_layers == 2 and fewer.config.hidden_size == 32
    for parameter, own in zip(whole.parameters, fewer.parameters, strict=True):
        everything = tuple(slice(0, size) for size in parameter.full_shape)
        values = whole.read(parameter, everything)
        expected = values[[0, 3]] if parameter.stack_shape else values
        part = tuple(slice(0, size) for size in own.full_shape)
        np.testing.assert_array_equal(fewer.read(own, part), expected)


@pytest.mark.slow
def test_a_proxy_that_blocks_the_hub_counts_as_unreachable(tmp_path, monkeypatch):
    class Refusal(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self):
            self.send_error(403)

        def log_message(self, *arguments):
            """Suppresses the log."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever).start()
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        script = "from experiments.base_model import Path, from_hub; print(from_hub(Path('.')))"
        found = run_python(script, cwd=tmp_path)
        server.shutdown()
    assert found.stdout == "None\n", found.stderr


def test_the_base_model_is_written_once_with_its_origin(small_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.base_model.from_hub", lambda downloads: small_llama)
    name = make_base_model(tmp_path / "base", (1,), tmp_path)
    assert "SmolLM2-135M-Instruct, layers [1]" in name
    monkeypatch.setattr("experiments.base_model.from_hub", lambda downloads: 1 / 0)
    assert make_base_model(tmp_path / "base", (1,), tmp_path) == name


def test_evaluation_data_keeps_spread_lines_and_all_documents(whole_data, tmp_path):
    write_smaller(whole_data, tmp_path / "less", 5)
    for path in (tmp_path / "less").rglob("*.gz"):
        own = read_lines(path)
        everything = read_lines(whole_data / path.relative_to(tmp_path / "less"))
        is_whole = path.name.startswith("documents") or "train" in path.parts
        assert len(own) == (len(everything) if is_whole else min(5, len(everything)))
        assert all(line in everything for line in own)
    queries = read_lines(tmp_path / "less/evaluation/corpora/foldoc_entries/queries.jsonl.gz")
    assert len({json.dumps(query) for query in queries}) == 5


def test_the_verdict_compares_with_the_noise_of_seeds():
    def columns(specialist, unified):
        names = (*report.EMBEDDING, *report.GENERATION)
        return {
            "embedding only": dict.fromkeys(names, specialist),
            "generation only": dict.fromkeys(names, specialist),
            "unified": dict.fromkeys(names, unified),
        }

    def words(specialist, unified):
        lines = report.verdict(columns(specialist, unified))[2:]
        found = {line.split("|")[2].strip(): line.split("|")[-2].strip() for line in lines}
        return found["nDCG@10"], found["bits per byte"]

    assert words([0.50, 0.52, 0.51], [0.51, 0.50, 0.52]) == ("within", "within")
    assert words([0.50, 0.52, 0.51], [0.61, 0.60, 0.62]) == ("better", "worse")
    assert words([0.50, 0.52, 0.51], [0.41, 0.40, 0.42]) == ("worse", "better")
    assert words([0.5], [0.6]) == ("one seed", "one seed")


def test_ablations_are_reported_without_unified():
    values = {name: [0.5] for name in (*report.EMBEDDING, *report.GENERATION)}
    text = report.report({"embedding only": values, ABLATIONS[0].name: values}, {})
    assert f"| dataset | measure | {ABLATIONS[0].name} |" in text


def test_runs_differ_in_the_fields_they_are_named_for():
    runs = claim.planned([3, 4], [run.name for run in MAIN], ablations=True)
    names = [run.name for run, _ in runs]
    assert names == [
        UNTRAINED.name,
        *[run.name for run in MAIN] * 2,
        *[run.name for run in ABLATIONS],
    ]
    assert len({str(claim.run_folder(Path(), *each)) for each in runs}) == 12
    assert claim.planned([3], ["unified"], ablations=False) == [(UNTRAINED, 0), (MAIN[2], 3)]


@pytest.mark.slow
def test_the_experiment_runs_from_data_to_tables_and_resumes(
    whole_data, small_llama, tmp_path, monkeypatch
):
    monkeypatch.setattr("experiments.base_model.from_hub", lambda downloads: small_llama)
    monkeypatch.setattr(claim, "find_minilm", lambda: None)
    baselines = {"chance": {"foldoc_entries/ndcg_at_10": 0.5}}
    monkeypatch.setattr(claim, "measure_baselines", lambda folder, minilm: baselines)
    options = argparse.Namespace(
        folder=tmp_path / "claim",
        preset="tiny",
        seeds=[1],
        runs=["embedding only"],
        ablations=False,
        data=Path("nowhere"),
    )
    console = Console(record=True, width=20)
    with pytest.raises(claim.ExperimentError, match=r"no folder .*nowhere: build it"):
        claim.run_experiment(options, console)
    assert not options.folder.exists()
    monkeypatch.chdir(whole_data.parent)
    options.data = Path(whole_data.name)
    claim.run_experiment(options, console)
    text = (tmp_path / "claim" / "report.md").read_text()
    assert text in console.export_text()
    assert "| foldoc_entries | nDCG@10 | 0.500 |" in text and "embedding only" in text
    assert (tmp_path / "claim" / "claim.svg").stat().st_size > 1000
    measures = {
        path.parent.name: json.loads(path.read_text())
        for path in (tmp_path / "claim" / "runs").glob("*/measures.json")
    }
    assert measures.keys() == {"untrained_0", "embedding_only_1"}
    perplexity = [one["measures"]["all_chats/bits_per_byte"] for one in measures.values()]
    assert len(set(perplexity)) == 2  # Each run was evaluated with its own weights.
    config = json.loads((tmp_path / "claim/runs/embedding_only_1/config.json").read_text())
    assert config["mode"] == "embedding" and config["seed"] == 1 and config["steps"] == 2

    options.preset = "cpu"
    with pytest.raises(claim.ExperimentError, match="has the preset tiny: use another folder"):
        claim.run_experiment(options, console)

    # Existing results are kept; missing ones are made.
    options.preset = "tiny"
    (tmp_path / "claim/runs/untrained_0/measures.json").unlink()
    monkeypatch.setattr(claim, "_train", lambda *arguments: 1 / 0)
    claim.run_experiment(options, console)
    assert (tmp_path / "claim" / "report.md").read_text() == text


def test_an_interrupted_experiment_says_how_to_resume(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(claim, "run_experiment", interrupted)
    assert claim.main([str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted; run the same command to resume\n"


def test_a_missing_folder_and_a_damaged_model_are_one_line_errors(
    whole_data, tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    assert claim.main([str(tmp_path / "file" / "claim")]) == 1
    assert "file/claim" in capsys.readouterr().err
    (tmp_path / "half" / "hub").mkdir(parents=True)  # As after an interrupted download.
    monkeypatch.setattr("experiments.base_model.from_hub", lambda downloads: tmp_path / "half/hub")
    monkeypatch.setattr(claim, "find_minilm", lambda: None)
    monkeypatch.setattr(claim, "measure_baselines", lambda folder, minilm: {})
    arguments = [str(tmp_path / "claim"), "--preset", "tiny", "--data", str(whole_data)]
    assert claim.main(arguments) == 1
    assert re.fullmatch(r"error: .*half/hub.*\n", capsys.readouterr().err)


def test_presets_set_existing_fields():
    from experiments.config import get_config
    from grit_jax.config import parse_config

    for preset in presets.PRESETS.values():
        for run in (*MAIN, *ABLATIONS):
            config = get_config()
            for name, value in {**preset.overrides, **(run.overrides or {})}.items():
                section, _, field = name.rpartition(".")
                holder = config[section] if section else config
                assert field in holder
                holder[field] = value
            parse_config(config)


def test_a_failing_command_is_reported_with_the_end_of_its_log(tmp_path, monkeypatch):
    (tmp_path / "that_raises.py").write_text("raise RuntimeError('why')")
    (tmp_path / "that_is_killed.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log"
    with pytest.raises(
        claim.ExperimentError,
        match=r"(?s)that_raises one two failed \(exit code 1\), see .*log.*RuntimeError: why",
    ):
        claim._call("that_raises", ["one", "two"], log)
    with pytest.raises(claim.ExperimentError, match=r"failed \(SIGKILL\)"):
        claim._call("that_is_killed", [], log)
