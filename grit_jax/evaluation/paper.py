"""The benchmarks and scores of the GRIT paper (arXiv 2402.09906, tables 1 and 2)."""

from collections.abc import Mapping
import dataclasses

# MTEB's name for the paper's 56 English tasks, and a few of them that take only minutes.
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
# Instructions of the original GritLM for tasks that have none in MTEB.
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
    """A row of the paper's table of embedding scores: one type of MTEB tasks.

    Attributes:
      task_type: MTEB's name of the type.
      metric: the main metric of these tasks.
      scores: the average scores of `MODELS`, in percent.
      tasks: MTEB's names of the tasks.
    """

    task_type: str
    metric: str
    scores: tuple[float, ...]
    tasks: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class GenerativeRow:
    """A row of the paper's table of generation scores: one benchmark.

    Attributes:
      name: the paper's name of the benchmark.
      setting: the number of examples in the prompt, and other settings of the paper.
      tasks: the closest tasks of lm-eval, if it has any.
      metric: the metric of these tasks in lm-eval's results.
      scores: the scores of `MODELS`, in percent.
    """

    name: str
    setting: str
    tasks: tuple[str, ...]
    metric: str
    scores: tuple[float, ...]


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
# The average over tasks, not over types of tasks.
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
# Numbers of examples before a question that differ between lm-eval and the paper.
NUM_FEWSHOT = {task: 1 for row in GENERATIVE if row.name == "TyDi QA" for task in row.tasks}


def average_embedding_scores(
    scores: Mapping[str, float],
) -> tuple[dict[str, tuple[float, int]], float | None]:
    """Averages the scores of MTEB tasks by type of task.

    Args:
      scores: the main score of each task, between 0 and 1.

    Returns:
      The average of each type of task, in percent, with the number of its tasks that have a score;
      and the average over all tasks, or None unless every task has a score.
    """
    averages, all_scores = {}, []
    for row in EMBEDDING:
        found = [scores[task] for task in row.tasks if task in scores]
        if found:
            averages[row.task_type] = (100 * sum(found) / len(found), len(found))
        all_scores += found
    is_complete = len(all_scores) == sum(len(row.tasks) for row in EMBEDDING)
    return averages, 100 * sum(all_scores) / len(all_scores) if is_complete else None


def average_generative_scores(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns the score, in percent, of each benchmark whose tasks all have one.

    Args:
      results: lm-eval's metrics of each task or group.
    """
    scores = {}
    for row in GENERATIVE:
        metrics = [results.get(task, {}) for task in row.tasks]
        found = [values[row.metric] for values in metrics if row.metric in values]
        if found and len(found) == len(row.tasks):
            scores[row.name] = 100 * sum(found) / len(found)
    return scores
