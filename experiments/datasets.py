"""The datasets of the experiment: what a model is asked for, and how much of each is held out."""

from experiments.facts import Dataset
from tools.sample.build import JARGON_INSTRUCTION, WORDNET_INSTRUCTION

DATASETS = (
    Dataset("wordnet", "senses", WORDNET_INSTRUCTION, held_out=1 / 10),
    Dataset("foldoc", "entries", "Given a computing term, retrieve its entry", held_out=1 / 7),
    # A corpus needs a thousand documents that nobody was trained on, which is half of these.
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
# A retrieval corpus with fewer passages of its own is filled up with those of this dataset.
FILLING = "foldoc"
SMALLEST_CORPUS = 1000
