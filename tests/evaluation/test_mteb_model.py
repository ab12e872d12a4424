"""Runs MTEB with a `GritLM`."""

import json
import shutil

from command_line import assert_fails_in_one_line
from command_line import grit_jax_in_process as grit_jax
import mteb
from mteb.results import TaskResult
from mteb.types import PromptType
import numpy as np
import pytest
import sample_tasks
from sample_tasks import SLANG_INSTRUCTION, SenseSTS, SlangRetrieval, senses, slang
from scipy.stats import spearmanr

from grit_jax import GritLM
from grit_jax.conversion import open_model
from grit_jax.evaluation import command as evaluate_command
from grit_jax.evaluation.mteb_model import MtebModel
from grit_jax.evaluation.paper import EMBEDDING, MTEB_BENCHMARK, QUICK_TASKS
from grit_jax.evaluation.results import Results, ResultsError
from grit_jax.evaluation.retrieval import retrieval_metrics
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.text.templates import EMBED, embedding_prefix
from grit_jax.user_modules import ModuleError

INSTRUCTIONS = {
    "ArguAna": "Given a claim, find documents that refute the claim",
    "STS12": "Retrieve semantically similar text.",
    "SummEval": "Given a news summary, retrieve other semantically similar summaries",
    "AskUbuntuDupQuestions": "Retrieve duplicate questions from AskUbuntu forum",
    "CQADupstackTexRetrieval": "Given a question, retrieve detailed question descriptions from "
    "Stackexchange that are duplicates to the given question",
}


@pytest.fixture(scope="session")
def mteb_model(model):
    return MtebModel(model, "small", "of-this-test")


@pytest.mark.slow
# In MTEB's own search for parallel sentences.
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
def test_mteb_accepts_it_for_every_kind_of_task_of_texts(mteb_model):
    finished = mteb.mock_run(mteb_model)
    assert finished.all_passed, finished.to_markdown()
    ran = [name for name, status in finished.items() if isinstance(status, TaskResult)]
    assert len(ran) >= 28


@pytest.mark.slow
def test_retrieval_of_real_texts_has_the_measure_of_the_embeddings(model, mteb_model):
    found = mteb.evaluate(mteb_model, SlangRetrieval(), cache=None)
    queries, corpus = slang()
    asked = model.encode(
        [query["text"] for query in queries], instruction=embedding_prefix(SLANG_INSTRUCTION)
    )
    answers = model.encode([document["text"] for document in corpus], instruction=EMBED)
    expected = retrieval_metrics(asked @ answers.T, [{number} for number in range(len(queries))])
    assert found.task_results[0].get_score() == pytest.approx(expected["ndcg_at_10"], abs=1e-5)
    # Without its instruction a query is another: the comparison can fail.
    plain = model.encode([query["text"] for query in queries], instruction=EMBED)
    others = retrieval_metrics(plain @ answers.T, [{number} for number in range(len(queries))])
    assert others["ndcg_at_10"] != pytest.approx(expected["ndcg_at_10"], abs=1e-5)


@pytest.mark.slow
def test_similarity_of_real_texts_has_the_measure_of_the_embeddings(model, mteb_model):
    found = mteb.evaluate(mteb_model, SenseSTS(), cache=None)
    first, second, scores = zip(*senses(), strict=True)
    instruction = embedding_prefix(SenseSTS.metadata.prompt)
    a, b = (model.encode(list(texts), instruction=instruction) for texts in (first, second))
    expected = spearmanr(np.sum(a * b, axis=1), scores).statistic
    assert found.task_results[0].get_score() == pytest.approx(expected, abs=1e-5)


def batches(*texts):
    return [{"text": list(texts)}]


def test_embeddings_keep_their_lengths_and_titles_stand_before_texts(model, mteb_model):
    given = {"task_metadata": SenseSTS.metadata, "hf_split": "test", "hf_subset": "default"}
    embeddings = mteb_model.encode(batches("A text", "Another one"), **given)
    assert np.abs(np.linalg.norm(embeddings, axis=1) - 1).min() > 1e-2
    instruction = embedding_prefix(SenseSTS.metadata.prompt)
    scaled = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    expected = model.encode(["A text", "Another one"], instruction=instruction)
    np.testing.assert_allclose(scaled, expected, atol=1e-5)


def test_texts_without_anything_in_them_and_long_ones_are_embedded(mteb_model, caplog):
    given = {"task_metadata": SenseSTS.metadata, "hf_split": "test", "hf_subset": "default"}
    with pytest.warns(UserWarning, match="1 of 3 texts were truncated to 512 tokens"):
        embeddings = mteb_model.encode(batches("", "word " * 700, None), **given)
    assert np.isfinite(embeddings).all() and embeddings.any(axis=1).all()
    assert "2 texts are empty" in caplog.text
    np.testing.assert_allclose(embeddings[2], embeddings[0], atol=1e-5)
    assert mteb_model.encode([], **given).shape == (0, 32)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"image": [object()]},
            "SenseSTS has no texts, but image, and this model embeds only",
        ),
        ({"text": ["a", 7.5]}, "SenseSTS has a text of type float"),
        ({"text": ["a", "b\ud83d"]}, "text 1 has half of a surrogate pair"),
    ],
)
def test_inputs_that_are_not_texts_are_named(mteb_model, batch, message):
    with pytest.raises(InputError, match=message):
        mteb_model.encode(
            [batch], task_metadata=SenseSTS.metadata, hf_split="test", hf_subset="default"
        )


@pytest.mark.slow
def test_the_papers_tasks_have_the_originals_instructions(mteb_model):
    tasks = {task.metadata.name: task for task in mteb.get_benchmark(MTEB_BENCHMARK).tasks}
    assert len(tasks) == 56 and set(QUICK_TASKS) <= set(tasks)
    kinds = {name: task.metadata.type for name, task in tasks.items()}
    assert {task: row.task_type for row in EMBEDDING for task in row.tasks} == kinds
    parts = tasks.pop("CQADupstackRetrieval").metadata.tasks
    for name, task in (tasks | {part.metadata.name: part for part in parts}).items():
        sides = [
            mteb_model.instruction(task.metadata, side)
            for side in (PromptType.query, PromptType.document, None)
        ]
        if task.metadata.type == "Retrieval":
            assert sides[0] and sides[1] == "", name
        else:
            assert sides[0] and len(set(sides)) == 1, name
    for name, instruction in INSTRUCTIONS.items():
        assert mteb_model.instruction(mteb.get_task(name).metadata, PromptType.query) == instruction


def test_a_users_instruction_takes_the_place_of_mtebs(model):
    own = MtebModel(model, "small", "1", instructions={"BIOSSES": "Of the same meaning"})
    metadata = mteb.get_task("BIOSSES").metadata
    assert own.instruction(metadata, None) == "Of the same meaning"


def test_mteb_keeps_scores_apart_that_were_measured_otherwise(model, exported, tmp_path):
    variants = [
        MtebModel(model, "small", "1"),
        MtebModel(model, "small", "1", instructions={"BIOSSES": "Of the same meaning"}),
        MtebModel(model, "small", "1", max_length=64),
        *(
            MtebModel(GritLM.from_pretrained(exported, **options), "small", "1")
            for options in ({"dtype": "bfloat16"}, {"dtype": "float32", "linear_dtype": "int8"})
        ),
    ]
    paths = {
        mteb.ResultCache(tmp_path).get_task_result_path("BIOSSES", one.mteb_model_meta)
        for one in variants
    }
    assert len(paths) == len(variants)


def test_scores_that_were_measured_otherwise_are_no_scores_of_this_run(exported, tmp_path):
    revision = open_model(exported).weights_fingerprint()
    results = Results(tmp_path, revision)
    settings = MtebModel(GritLM.from_pretrained(exported), "small", "1", max_length=64).settings
    results.begin("mteb", settings)
    results.add("mteb", {"STS12": 0.5})
    command = ["mteb", str(exported), "--output", str(tmp_path), "--tasks", "BIOSSES"]
    with pytest.raises(ResultsError, match="--max-length was 64 and is 512"):
        evaluate_command.run(command)


def names(*options):
    arguments = evaluate_command._parser().parse_args(
        ["mteb", "nowhere", "--output", "out", *options]
    )
    return [task.metadata.name for task in evaluate_command._mteb_tasks(arguments)]


def test_ones_own_tasks_are_measured_beside_a_presets(capsys):
    own = ["--module", "sample_tasks"]
    assert names(*own, "--preset", "quick") == [*names(*own), *QUICK_TASKS]
    with pytest.raises(SystemExit):
        names("--preset", "quick", "--tasks", "STS12")
    assert "not allowed with argument --preset" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_file_of_instructions_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "instructions.json"
    path.write_text(content)
    options = ["--tasks", "BIOSSES", "--instructions", str(path)]
    with pytest.raises(InputError, match=r"--instructions .*instructions.json"):
        evaluate_command.run(["mteb", "nowhere", "--output", "out", *options])


@pytest.mark.slow
def test_the_command_measures_and_shows_the_papers_table(exported, tmp_path):
    shutil.copy(sample_tasks.__file__, tmp_path / "my_tasks.py")
    command = ["evaluate", "mteb", exported, "--module", "my_tasks", "--output", "results"]
    finished = grit_jax(*command, "--dtype=float32", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    scores = json.loads((tmp_path / "results" / "scores.json").read_text())["mteb"]
    assert scores.keys() == {"SlangRetrieval", "SenseSTS"}
    for name, score in scores.items():
        assert f"{name}: {100 * score:.1f}" in finished.stdout
    assert "GritLM 8x7B" not in finished.stdout  # The paper has none of these tasks.
    # The results of another model are not mixed with these.
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    weights = next(other.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-4000:] = bytes(4000)
    weights.write_bytes(content)
    finished = grit_jax(*[other if one == exported else one for one in command], cwd=tmp_path)
    assert_fails_in_one_line(finished, "results of another model", "--output")


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        (["--tasks", "NoSuchTask"], InputError, "NoSuchTask"),
        ([], InputError, "no tasks: use"),
        (["--module", "no_such_module.tasks"], ModuleError, "no_such_module"),
    ],
)
def test_a_task_that_there_is_not_is_named_before_the_model_is_read(options, error, named):
    with pytest.raises(error, match=named):
        evaluate_command.run(["mteb", "nowhere", "--output", "out", *options])


@pytest.mark.slow
def test_a_damaged_tokenizer_is_named_in_one_line(exported, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    options = ["--module", "my_tasks", "--output", "results", "--tokenizer", "tokenizer.json"]
    shutil.copy(sample_tasks.__file__, tmp_path / "my_tasks.py")
    finished = grit_jax("evaluate", "mteb", exported, *options, cwd=tmp_path)
    assert_fails_in_one_line(finished, "TokenizerError", "tokenizer.json")
