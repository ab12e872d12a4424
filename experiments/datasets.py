"""The datasets of the experiment, with their instructions and held-out fractions."""

from experiments.facts import Dataset
from tools.sample.build import JARGON_INSTRUCTION, WORDNET_INSTRUCTION

DATASETS = (
    Dataset("wordnet", "senses", WORDNET_INSTRUCTION, held_out=1 / 10),
    Dataset("foldoc", "entries", "Given a computing term, retrieve its entry", held_out=1 / 7),
    # A corpus needs 1,000 held-out documents, which is half of this dataset.
    Dataset("jargon", "entries", JARGON_INSTRUCTION, held_out=1 / 2),
    Dataset(
        "debian",
        "descriptions",
        "Given the short description of a software package, retrieve its long description",
        held_out=1 / 20,
    ),
    Dataset("faq", "answers", "Given a question about Perl or Python, retrieve its answer", 1 / 4),
    Dataset("reasoning", "", "", held_out=1 / 10, most_chats=800),
)
# Smaller retrieval corpora are filled up with passages of this dataset.
FILLING = "foldoc"
SMALLEST_CORPUS = 1000
