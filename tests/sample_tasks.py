"""MTEB tasks made from the embedded sample, declared as in a user's module."""

import gzip
import json

from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata

from grit_jax.sample import SAMPLE_FOLDER

SLANG_INSTRUCTION = "Given a term of hacker slang, retrieve its entry"


def held_out(name, count):
    with gzip.open(SAMPLE_FOLDER / "held_out" / f"{name}.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def described(name, kind, main_score, prompt):
    return TaskMetadata(
        name=name,
        type=kind,
        main_score=main_score,
        prompt=prompt,
        description="From the embedded sample.",
        dataset={"path": "NA", "revision": "NA"},
        eval_langs=["eng-Latn"],
    )


def slang(count=60):
    """Returns terms of the Jargon File as queries, and its entries as the corpus."""
    lines = held_out("jargon_entries", count)
    corpus = [{"id": str(i), "title": "", "text": one["pos"][0][1]} for i, one in enumerate(lines)]
    queries = [{"id": str(i), "text": one["query"][1]} for i, one in enumerate(lines)]
    return queries, corpus


class SlangRetrieval(AbsTaskRetrieval):
    """Retrieves the Jargon File entry of a term."""

    metadata = described("SlangRetrieval", "Retrieval", "ndcg_at_10", {"query": SLANG_INSTRUCTION})

    def load_data(self, num_proc=None, **options):
        queries, corpus = slang()
        split = RetrievalSplitData(
            corpus=Dataset.from_list(corpus),
            queries=Dataset.from_list(queries),
            relevant_docs={query["id"]: {query["id"]: 1} for query in queries},
            top_ranked=None,
        )
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def senses(count=40):
    """Returns (sentence, definition, 1.0 if the definition is that of the word in it else 0.0)."""
    lines = [one for one in held_out("wordnet_senses", count) if one["neg"]]
    right = [(one["query"][1], one["pos"][0][1], 1.0) for one in lines]
    wrong = [(one["query"][1], one["neg"][0][1], 0.0) for one in lines]
    return right + wrong


class SenseSTS(AbsTaskSTS):
    """Matches WordNet's example sentences with definitions of a word in them."""

    metadata = described("SenseSTS", "STS", "cosine_spearman", "Retrieve the word's meaning")

    def load_data(self, num_proc=None, **options):
        names = ("sentence1", "sentence2", "score")
        pairs = [dict(zip(names, pair, strict=True)) for pair in senses()]
        self.dataset = DatasetDict({"test": Dataset.from_list(pairs)})
        self.data_loaded = True
