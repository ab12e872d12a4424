"""The tasks that the paper measures (arXiv 2402.09906, tables 1 and 2), and what it found."""

from collections.abc import Mapping
import dataclasses

# MTEB's name of the paper's 56 English tasks, and a few of them that take minutes.
MTEB_BENCHMARK = "MTEB(eng, v1)"
QUICK_TASKS = (
    "Banking77Classification",
    "MedrxivClusteringS2S",
    "TwitterSemEval2015",
    "AskUbuntuDupQuestions",
    "NFCorpus",
    "SciFact",
    "BIOSSES",
    "STSBenchmark",
    "SummEval",
)

FORUMS = (
    "Android English Gaming Gis Mathematica Physics Programmers Stats Tex Unix Webmasters Wordpress"
)
# Of the original, where MTEB says none of its own.
INSTRUCTIONS = {
    "SummEval": "Given a news summary, retrieve other semantically similar summaries",
} | {
    f"CQADupstack{forum}Retrieval": "Given a question, retrieve detailed question descriptions "
    "from Stackexchange that are duplicates to the given question"
    for forum in FORUMS.split()
}

MODELS = ("GritLM 7B", "embedding only", "generation only", "GritLM 8x7B")


@dataclasses.dataclass(frozen=True)
class EmbeddingRow:
    """A kind of MTEB's tasks.

    Attributes:
      kind: as MTEB calls it.
      measure: the main one of these tasks.
      values: of `MODELS`, in hundredths.
      tasks: their names in MTEB.
    """

    kind: str
    measure: str
    values: tuple[float, ...]
    tasks: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class GenerativeRow:
    """A benchmark of generation.

    Attributes:
      name: as the paper calls it.
      setting: of the paper.
      tasks: lm-eval's tasks that come nearest; none if it has none.
      metric: of lm-eval's results.
      values: of `MODELS`, in hundredths.
    """

    name: str
    setting: str
    tasks: tuple[str, ...]
    metric: str
    values: tuple[float, ...]


def _names(names: str) -> tuple[str, ...]:
    return tuple(names.split())


EMBEDDING = (
    EmbeddingRow(
        "Classification",
        "accuracy",
        (79.5, 78.8, 65.4, 78.5),
        _names(
            "AmazonPolarityClassification AmazonReviewsClassification Banking77Classification "
            "EmotionClassification ImdbClassification MTOPDomainClassification "
            "MTOPIntentClassification MassiveIntentClassification MassiveScenarioClassification "
            "ToxicConversationsClassification TweetSentimentExtractionClassification "
            "AmazonCounterfactualClassification"
        ),
    ),
    EmbeddingRow(
        "Clustering",
        "V-measure",
        (50.6, 51.1, 32.7, 50.1),
        _names(
            "ArxivClusteringP2P ArxivClusteringS2S BiorxivClusteringP2P BiorxivClusteringS2S "
            "MedrxivClusteringP2P MedrxivClusteringS2S RedditClustering RedditClusteringP2P "
            "StackExchangeClustering StackExchangeClusteringP2P TwentyNewsgroupsClustering"
        ),
    ),
    EmbeddingRow(
        "PairClassification",
        "average precision",
        (87.2, 87.1, 54.2, 85.0),
        _names("SprintDuplicateQuestions TwitterSemEval2015 TwitterURLCorpus"),
    ),
    EmbeddingRow(
        "Reranking",
        "MAP",
        (60.5, 60.7, 43.0, 59.8),
        _names("AskUbuntuDupQuestions MindSmallReranking SciDocsRR StackOverflowDupQuestions"),
    ),
    EmbeddingRow(
        "Retrieval",
        "nDCG@10",
        (57.4, 57.5, 13.7, 55.1),
        _names(
            "ArguAna ClimateFEVER CQADupstackRetrieval DBPedia FEVER FiQA2018 HotpotQA MSMARCO "
            "NFCorpus NQ QuoraRetrieval SCIDOCS SciFact Touche2020 TRECCOVID"
        ),
    ),
    EmbeddingRow(
        "STS",
        "Spearman",
        (83.4, 83.8, 60.2, 83.3),
        _names("BIOSSES SICK-R STS12 STS13 STS14 STS15 STS16 STS17 STS22 STSBenchmark"),
    ),
    EmbeddingRow(
        "Summarization",
        "Spearman",
        (30.4, 30.2, 21.1, 29.8),
        _names("SummEval"),
    ),
)
# Over tasks, not over kinds.
EMBEDDING_AVERAGE = (66.8, 66.8, 41.2, 65.7)

TYDIQA_LANGUAGES = ("ar", "bn", "en", "fi", "id", "ko", "ru", "sw", "te")
GENERATIVE = (
    GenerativeRow("MMLU", "0-shot", ("mmlu",), "acc,none", (57.6, 23.5, 57.5, 66.7)),
    GenerativeRow(
        "GSM8K", "8-shot", ("gsm8k_cot",), "exact_match,strict-match", (57.5, 1.0, 52.0, 61.5)
    ),
    GenerativeRow(
        "BBH", "3-shot", ("bbh_cot_fewshot",), "exact_match,get-answer", (54.8, 0.0, 55.4, 70.2)
    ),
    GenerativeRow(
        "TyDi QA",
        "1-shot, gold passage",
        tuple(f"tydiqa_goldp_{language}" for language in TYDIQA_LANGUAGES),
        "f1,none",
        (55.4, 21.0, 56.6, 58.2),
    ),
    GenerativeRow(
        "HumanEval",
        "0-shot, pass@1",
        ("humaneval_instruct",),
        "pass@1,create_test",
        (32.8, 0.0, 34.5, 53.4),
    ),
    GenerativeRow("AlpacaEval", "0-shot, wins", (), "", (74.8, 0.0, 75.4, 84.0)),
)
GENERATIVE_AVERAGE = (55.5, 7.6, 55.2, 65.7)
# Examples before a question, where lm-eval's own number is another than the paper's.
NUM_FEWSHOT = {task: 1 for row in GENERATIVE if row.name == "TyDi QA" for task in row.tasks}


def own_embedding_values(
    scores: Mapping[str, float],
) -> tuple[dict[str, tuple[float, int]], float | None]:
    """Returns one's own mean of each kind of tasks and how many it is of, and the mean of all.

    Args:
      scores: main score of each task, between 0 and 1.

    Returns:
      Values in hundredths; the mean of all is None unless every task has a score.
    """
    found, every = {}, []
    for row in EMBEDDING:
        own = [scores[task] for task in row.tasks if task in scores]
        if own:
            found[row.kind] = (100 * sum(own) / len(own), len(own))
        every += own
    is_whole = len(every) == sum(len(row.tasks) for row in EMBEDDING)
    return found, 100 * sum(every) / len(every) if is_whole else None


def own_generative_values(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns one's own value, in hundredths, of each benchmark whose tasks all have one.

    Args:
      results: lm-eval's, of each task or group.
    """
    found = {}
    for row in GENERATIVE:
        measured = [results.get(task, {}) for task in row.tasks]
        own = [values[row.metric] for values in measured if row.metric in values]
        if own and len(own) == len(row.tasks):
            found[row.name] = 100 * sum(own) / len(own)
    return found
