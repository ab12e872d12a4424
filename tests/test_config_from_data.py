"""Fields of a configuration that come from the prepared data, and how a trained model embeds."""

import json
import shutil

from command_line import ROOT, grit_jax_in_process
from etils import epath
import pytest
import reference_values
from tokenizer_files import write_tokenizer

from grit_jax.config import ConfigError
from grit_jax.config_flags import parse_flags
from grit_jax.config_from_data import complete_config
from grit_jax.conversion import open_model
from grit_jax.from_config import (
    describe_new_masking,
    make_batches,
    make_embedding_spec,
    make_trainer,
)
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.run import run

NUM_QUESTIONS, NUM_CHATS = 70, 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with its tokenizer, and a user's data prepared for it."""
    folder = tmp_path_factory.mktemp("finetune")
    shutil.copytree(reference_values.FOLDER / "tiny-mistral", folder / "model")
    tokenizer = write_tokenizer(folder / "model", "smollm", size=300)
    lines = {
        "questions": [
            # Each question stands in two lines.
            {"query": ["Find the article:", f"q{n // 2}"], "pos": [f"a{n}"]}
            for n in range(NUM_QUESTIONS)
        ],
        "chats": [{"text": [f"hello {n}", "hi"]} for n in range(NUM_CHATS)],
    }
    (folder / "mine").mkdir()
    for name, objects in lines.items():
        (folder / "mine" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, objects)))
    options = ("--output", "data", "--tokenizer", tokenizer, "--processes", 1)
    finished = grit_jax_in_process("prepare", "mine", *options, cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture
def data(folder, tmp_path):
    return shutil.copytree(folder / "data", tmp_path / "data")


def parse(folder, data, *argv):
    common = [f"--config={ROOT}/configs/finetune.py", f"--config.data.folder={data}"]
    return parse_flags([*common, f"--config.model.weights={folder}/model", *argv])[0]


def change_manifests(data, dataset, **fields):
    for path in data.glob(f"*{dataset}/*/manifest.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_kinds_mixtures_lengths_and_steps_are_those_of_the_data(folder, data):
    change_manifests(data, "questions", longest={"query": 300, "passage": 1000})
    config = complete_config(parse(folder, data, "--config.epochs=3"))
    assert config.mode == "unified"
    assert (config.data.embedding, config.data.generative) == ("mine_embedding", "mine_chat")
    assert config.data.row_lengths == {"query": 512, "passage": 1280, "chat": 512}
    assert config.steps == 8  # Enough for 3 * 20 chats, 8 per step.
    given = ("--config.data.passage_row_length=4096", "--config.mode=embedding")
    config = complete_config(parse(folder, data, *given))
    assert config.data.row_lengths == {"query": 512, "passage": 4096, "chat": 0}
    assert config.steps == 3  # Enough for 70 questions, 32 per step.


def test_one_kind_of_data_sets_the_mode_and_several_mixtures_must_be_named(folder, data):
    shutil.copy(data / "mine_embedding.json", data / "more.json")
    message = r"config.data.embedding='auto', but .* 2 .*: name one of mine_embedding, more"
    with pytest.raises(ConfigError, match=message):
        complete_config(parse(folder, data))
    (data / "mine_chat.json").unlink()
    config = complete_config(parse(folder, data, "--config.data.embedding=more"))
    assert (config.mode, config.data.embedding) == ("embedding", "more")
    with pytest.raises(ConfigError, match=r"folder='nowhere' has no prepared data"):
        complete_config(parse(folder, "nowhere"))


@pytest.mark.slow
def test_a_finetuned_model_embeds_with_the_instruction_of_training(folder, tmp_path, capsys):
    flags = ("--config.model.dtype=float32", "--config.log_every_steps=1")
    run(parse(folder, folder / "data", *flags), epath.Path(tmp_path / "run"))
    report = capsys.readouterr().out
    expected = "queries are embedded with 'Find the article'; documents without an instruction"
    assert expected in report and "no longer negatives" not in report
    spec = EmbeddingSpec.from_fields(open_model(tmp_path / "run").fields)
    assert spec.query_prompt == "<|user|>\nFind the article\n<|embed|>\n"
    assert spec.document_prompt == "<|embed|>\n"
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["steps"] == 3 and stored["data"]["embedding"] == "mine_embedding"


@pytest.mark.parametrize(
    ("manifest", "flags", "prompts", "words"),
    [
        ({}, ["query_instruction=Find: "], ("<|user|>\nFind\n<|embed|>\n", "<|embed|>\n"), "with"),
        ({}, ["query_instruction="], ("<|embed|>\n",) * 2, "queries are embedded without an"),
        (
            {"instructions": {"query": {"count": 7, "first": ["a"]}}},
            ["document_instruction=b"],
            ("<|embed|>\n", "<|user|>\nb\n<|embed|>\n"),
            "(training has 7; choose one with config.data.query_instruction); documents with 'b'",
        ),
        # Prepared by an earlier version.
        ({"instructions": {}}, [], ("<|embed|>\n",) * 2, "earlier versions is unknown"),
    ],
)
def test_the_default_instructions_are_chosen_and_said(
    folder, data, manifest, flags, prompts, words
):
    change_manifests(data, "questions", **manifest)
    flags = ["--config.mode=embedding", *(f"--config.data.{flag}" for flag in flags)]
    config = complete_config(parse(folder, data, *flags))
    batches = make_batches(config, make_trainer_of(config))
    spec, said = make_embedding_spec(config, batches)
    assert (spec.query_prompt, spec.document_prompt) == prompts
    assert words in said


def make_trainer_of(config):
    return make_trainer(config, open_model(config.model.weights))


def test_a_continued_run_of_an_earlier_version_says_what_is_masked_now(folder, data):
    field = "same_query_positives_are_negatives"
    config = complete_config(parse(folder, data, "--config.mode=embedding"))
    batches = make_batches(config, make_trainer_of(config))
    assert f"--config.data.{field}=True" in describe_new_masking(config, batches, {"data": {}})
    assert describe_new_masking(config, batches, {"data": {field: False}}) is None
    config = parse(folder, data, f"--config.data.{field}=True")
    assert describe_new_masking(config, batches, {"data": {}}) is None
