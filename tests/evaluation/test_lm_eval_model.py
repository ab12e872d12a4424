"""In lm-eval, a `GritLM` has the same scores as its export in lm-eval's model for transformers."""

import json
import shutil

from command_line import assert_fails_in_one_line
from command_line import grit_jax_in_process as grit_jax
import numpy as np
import pytest
from sample_tasks import held_out
from tokenizer_files import BEGIN, END, write_tokenizer
import yaml

from grit_jax import GritLM
from grit_jax.evaluation.lm_eval_model import LmEvalModel
from grit_jax.evaluation.paper import GENERATIVE, NUM_FEWSHOT
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.text.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """Tasks of WordNet: a word's sense chosen, a definition made, and how likely the texts are."""
    folder = tmp_path_factory.mktemp("tasks")
    senses = [
        {
            "question": one["query"][1],
            "choices": [text for _, text in (one["pos"] + one["neg"])],
            "answer": 0,
        }
        for one in held_out("wordnet_senses", 60)
        if len(one["neg"]) == 2
    ]
    chats = [
        {"question": user, "answer": assistant}
        for user, assistant in (one["text"] for one in held_out("wordnet_chat", 8))
    ]
    texts = [{"text": f"{one['question']} {one['answer']} "} for one in chats[:5]]
    texts.append({"text": "A text that is longer than the model's context. " * 80})
    files = {
        "senses": write_lines(folder / "senses.jsonl", senses[:24]),
        "chats": write_lines(folder / "chats.jsonl", chats),
        "texts": write_lines(folder / "texts.jsonl", texts),
    }
    common = {
        "dataset_path": "json",
        "test_split": "test",
        "fewshot_split": "test",
        "num_fewshot": 0,
    }
    tasks = [
        {
            "task": "wordnet_choice",
            "dataset_kwargs": {"data_files": {"test": files["senses"]}},
            "output_type": "multiple_choice",
            "doc_to_text": "What does the first word mean? {{question}}\n",
            "doc_to_target": "answer",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        {
            "task": "wordnet_letter",
            "dataset_kwargs": {"data_files": {"test": files["senses"]}},
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}\nA: {{choices[0]}}\nB: {{choices[1]}}\nAnswer:",
            "doc_to_target": "answer",
            "doc_to_choice": ["A", "B"],
            "metric_list": [{"metric": "acc"}],
        },
        {
            "task": "wordnet_definition",
            "dataset_kwargs": {"data_files": {"test": files["chats"]}},
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "answer",
            "generation_kwargs": {"until": [".", "\n\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        {
            "task": "wordnet_perplexity",
            "dataset_kwargs": {"data_files": {"test": files["texts"]}},
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    ]
    for task in tasks:
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


@pytest.fixture(scope="module")
def sides(exported, model):
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(exported), dtype="float32", device="cpu", batch_size=4)
    return LmEvalModel(model), theirs


def measured(side, folder, task, **options):
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        side,
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("wordnet_choice", {"num_fewshot": 2, "apply_chat_template": True}),
        ("wordnet_letter", {"num_fewshot": 12}),  # More than the context holds.
        ("wordnet_definition", {}),
        ("wordnet_definition", {"num_fewshot": 2, "apply_chat_template": True}),
        ("wordnet_perplexity", {}),
    ],
)
def test_values_are_those_of_the_harness_own_model(sides, task_folder, task, options):
    ours, theirs = (measured(side, task_folder, task, limit=6, **options) for side in sides)
    for own, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
        for a, b in zip(own["filtered_resps"], other["filtered_resps"], strict=True):
            if isinstance(b, str):
                assert a == b
            else:
                np.testing.assert_allclose(np.float64(a), np.float64(b), atol=2e-3)
    own, other = ours["results"][task], theirs["results"][task]
    numbers = [name for name, value in other.items() if isinstance(value, float)]
    assert numbers
    for name in numbers:
        assert own[name] == pytest.approx(other[name], rel=1e-4), name


def test_a_turn_of_the_chat_is_the_export_s_template(sides):
    chat = [
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": " Hello. "},
        {"role": "user", "content": "Who?"},
    ]
    ours, theirs = sides
    assert f"<s>{ours.apply_chat_template(chat)}" == theirs.apply_chat_template(chat)
    prompt = theirs.apply_chat_template(chat)
    assert ours.tok_encode(ours.apply_chat_template(chat)) == theirs.tok_encode(prompt)
    begun = [*chat, {"role": "assistant", "content": "I am"}]
    assert ours.apply_chat_template(begun, False).endswith("<|assistant|>\nI am")
    said = [{"role": "system", "content": "Be kind."}, *chat]
    assert f"<s>{ours.apply_chat_template(said)}" == theirs.apply_chat_template(said)


@pytest.mark.parametrize("begin", [(), (BEGIN,)])
@pytest.mark.parametrize("bos", [BEGIN, None])
def test_texts_begin_as_in_the_harness_own_model(exported, model, tmp_path, begin, bos):
    from lm_eval.models.huggingface import HFLM

    folder = shutil.copytree(exported, tmp_path / "model")
    write_tokenizer(folder, "gpt2", begin=begin)
    for name in ("special_tokens_map.json", "tokenizer.model"):
        (folder / name).unlink()
    tokens = {"bos_token": bos, "eos_token": END, "pad_token": END}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = LmEvalModel(GritLM(model.model, model.mesh, Tokenizer(folder)))
    theirs = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)
    assert ours.prefix_token_id == theirs.prefix_token_id
    for text in ("A text.", f"{BEGIN}A text.", f"a{END} b"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours._encode_pair(text, " more") == theirs._encode_pair(text, " more")


def test_what_a_task_asks_of_generation_reaches_the_model(sides):
    from lm_eval.api.instance import Instance

    ours, _ = sides

    def generate(options):
        request = Instance("generate_until", doc={}, arguments=("A text", options), idx=0)
        return ours.generate_until([request])

    draw = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_k": 0}
    greedy = generate(draw | {"do_sample": False})
    assert generate(draw) != greedy
    assert generate(draw | {"top_k": 1}) == greedy
    assert generate(draw | {"top_k": None, "min_p": None}) == generate(draw)
    assert generate(draw | {"temperature": 0.0, "top_p": 0.9}) == greedy
    assert generate({"max_gen_toks": 8, "temperature": 1.5}) == generate(draw)
    assert generate({"max_gen_toks": 8, "top_p": 0.9, "num_beams": 1}) == greedy
    with pytest.raises(InputError, match=r"num_beams.*supported are temperature"):
        generate(draw | {"num_beams": 4})
    with pytest.raises(InputError, match=r"512 new tokens.*max_gen_toks"):
        generate({"max_gen_toks": 512})


LIKELIHOOD, ROLLING, UNTIL = "loglikelihood", "loglikelihood_rolling", "generate_until"
WORDS = "a quick brown fox "


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (LIKELIHOOD, ("", "Paris is nice")),
        (LIKELIHOOD, (" ", "nice")),
        (LIKELIHOOD, ("Paris is \n ", "nice")),
        (LIKELIHOOD, ("Paris", "\n")),
        (LIKELIHOOD, ("def f():\n    x = 1\n", "    return  x")),
        (LIKELIHOOD, ("I am", " 🙂👩‍👩‍👧")),
        (LIKELIHOOD, (WORDS * 200, "end")),
        (LIKELIHOOD, ("a", " word" * 500)),
        (ROLLING, ("",)),
        (ROLLING, ("\n",)),
        *((ROLLING, (" ".join(["a"] * count),)) for count in (511, 512, 513, 1024, 1025)),
        (UNTIL, ("", {"until": [], "max_gen_toks": 4})),
        (UNTIL, ("Who?", {"until": " ", "max_gen_toks": 8})),
        (UNTIL, (WORDS * 200, {"until": ["\n"], "max_gen_toks": 8})),
    ],
    ids=str,
)
def test_odd_requests_have_the_values_of_the_harness_own_model(sides, kind, arguments):
    from lm_eval.api.instance import Instance

    request = Instance(kind, doc={}, arguments=arguments, idx=0)
    ours, theirs = (getattr(side, kind)([request], disable_tqdm=True) for side in sides)
    if kind == UNTIL:
        assert ours == theirs
    else:
        np.testing.assert_allclose(np.float64(ours), np.float64(theirs), atol=2e-3)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (LIKELIHOOD, ("Paris", ""), "document 7 of capitals: .*continuation is empty"),
        (LIKELIHOOD, ("", ""), "document 7 of capitals: .*continuation is empty"),
        (LIKELIHOOD, ("The ab", "stract"), "document 7 of capitals: .*0 tokens"),
        (LIKELIHOOD, ("a", " word" * 600), "document 7 of capitals: .*600 tokens"),
        (UNTIL, ("a\ud83d", {"until": []}), "document 7 of capitals has half of a surrogate"),
        (UNTIL, ("a", {"until": [""]}), "empty"),
        (UNTIL, ("a", {"until": [], "max_gen_toks": 0}), "max_gen_toks"),
    ],
    ids=str,
)
def test_requests_without_an_answer_name_their_document(sides, kind, arguments, message):
    from lm_eval.api.instance import Instance

    good = {LIKELIHOOD: ("a", " b"), UNTIL: ("a", arguments[1])}[kind]
    requests = [
        Instance(kind, doc={}, arguments=one, idx=0, metadata=("capitals", number, 1))
        for one, number in ((good, 3), (arguments, 7))
    ]
    with pytest.raises(InputError, match=message) as caught:
        getattr(sides[0], kind)(requests, disable_tqdm=True)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("roles", [["system"], ["assistant", "user"], ["user", "user"]])
def test_messages_that_are_not_a_chat_are_refused_as_by_the_export(sides, roles):
    from jinja2 import TemplateError

    chat = [{"role": role, "content": "a"} for role in roles]
    ours, theirs = sides
    with pytest.raises(InputError, match=f"a task's chat has the roles {', '.join(roles)}: "):
        ours.apply_chat_template(chat)
    with pytest.raises(TemplateError):
        theirs.tokenizer.apply_chat_template(chat, tokenize=False)


def test_the_papers_tasks_are_the_harness_own():
    from lm_eval.tasks import TaskManager

    known = set(TaskManager().all_tasks)
    names = {task for row in GENERATIVE for task in row.tasks}
    assert len(names) == 13 and names <= known and set(NUM_FEWSHOT) <= names


def test_the_command_measures_and_shows_the_papers_table(exported, task_folder, tmp_path):
    options = ["--task-folder", task_folder, "--output", "results", "--dtype=float32", "--limit=4"]
    tasks = ["--tasks", "wordnet_letter", "wordnet_definition"]
    finished = grit_jax("evaluate", "lm-eval", exported, *tasks, *options, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    scores = json.loads((tmp_path / "results" / "scores.json").read_text())["lm_eval"]
    assert scores.keys() == {"wordnet_letter (limit 4)", "wordnet_definition (limit 4)"}
    assert f"acc,none {scores['wordnet_letter (limit 4)']['acc,none']:.4f}" in finished.stdout
    assert len(list((tmp_path / "results" / "lm_eval").glob("*.json"))) == 2
    assert "HumanEval" not in finished.stdout  # The paper has none of these tasks.
    options[-1] = "--tasks=no_such_task"
    finished = grit_jax("evaluate", "lm-eval", "nowhere", *options, cwd=tmp_path)
    assert_fails_in_one_line(finished, "no_such_task", "--task-folder")
