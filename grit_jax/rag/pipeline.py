"""Retrieval and generation by one model (GRIT, arXiv 2402.09906, section 5): six ways to answer.

A question is embedded, the nearest documents are found, and the model answers with them in its
prompt. What was embedded has been read already: its keys and values, read bidirectionally, may
stand in the place of its text.

    query-prompt            question, documents, as text
    document-prompt         documents, question, as text
    query-cache             the question's cache, documents as text
    document-cache          the documents' caches, the question as text
    query-document-cache    both caches, the question's first
    document-query-cache    both caches, the documents' first

In the last two neither has seen the other.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.prompt_encoder import InputError, PromptEncoder
from grit_jax.models import KVCache
from grit_jax.rag.documents import join_documents
from grit_jax.rag.index import DocumentIndex
from grit_jax.text.templates import ASSISTANT, EMBED, USER

# The prompts are the paper's (its appendix on RAG): what stands before the answer.
AFTER_QUERY = "Optionally using the prior context answer the query prior to it\n"
AFTER_DOCUMENT = "Answer the prior query while optionally using the context prior to it\n"
PROMPTS = {
    "query-prompt": f"{USER}{{query}}\n\n{{documents}}\n\n{AFTER_QUERY}{ASSISTANT}",
    "document-prompt": f"{USER}{{documents}}\n\n{{query}}\n\n{AFTER_DOCUMENT}{ASSISTANT}",
    "query-cache": f"\n{USER}{{documents}}\n\n{AFTER_QUERY}{ASSISTANT}",
    "document-cache": f"\n{USER}{{query}}\n\n{AFTER_DOCUMENT}{ASSISTANT}",
    "query-document-cache": f"\n{USER}{AFTER_QUERY}{ASSISTANT}",
    "document-query-cache": f"\n{USER}{AFTER_DOCUMENT}{ASSISTANT}",
}
CACHE_MODES = tuple(PROMPTS)
ANSWER_PREFIX = "The answer is"
# Questions whose caches exist at once: they take memory for each token of question and documents.
QUESTIONS_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class RagAnswer:
    """An answer and where it is from.

    Attributes:
      answer: the text behind the prefix of answers.
      numbers: of the documents in the index, the nearest first.
      scores: their inner products with the question.
    """

    answer: str
    numbers: list[int]
    scores: list[float]


class RagPipeline:
    """Answers questions from an index.

    Args:
      model: embeds and generates.
      index: made with that model.
      way: one of `CACHE_MODES`.
      num_documents: documents for each question.
      positions: "continued", where caches are joined, gives the second the positions that follow
        the first; "restarted" leaves its keys at the positions from 0 on that it was read with, as
        the original does.
      answer_prefix: the words that every answer begins with.

    Raises:
      InputError: an option is unknown.
    """

    def __init__(
        self,
        model: GritLM,
        index: DocumentIndex,
        way: str = "document-cache",
        *,
        num_documents: int = 1,
        positions: str = "continued",
        answer_prefix: str = ANSWER_PREFIX,
    ):
        if way not in CACHE_MODES:
            raise InputError(f"way={way!r} must be one of {', '.join(CACHE_MODES)}")
        if positions not in ("continued", "restarted"):
            raise InputError(f"positions={positions!r} must be 'continued' or 'restarted'")
        self._model, self._index, self._way = model, index, way
        self._num_documents, self._positions = num_documents, positions
        self._answer_prefix = answer_prefix
        # What is read from caches, in this order.
        self._cached = way.removesuffix("-cache").split("-") if way.endswith("-cache") else []

    def ask(
        self, questions: str | Sequence[str], max_new_tokens: int = 16, **options: Any
    ) -> list[RagAnswer]:
        """Returns the answer to each question.

        Args:
          questions: one or several.
          max_new_tokens: of an answer.
          **options: see `GritLM.generate`.

        Raises:
          InputError: a question is empty, or with its documents too long for the model.
        """
        questions = [questions] if isinstance(questions, str) else list(questions)
        self._check(questions)
        at_once = min(len(questions), QUESTIONS_AT_ONCE if self._cached else len(questions))
        answered: list[RagAnswer] = []
        for start in range(0, len(questions), at_once):
            some = questions[start : start + at_once]
            # The last are filled up with copies, so that no program is compiled for their number.
            filled = some + some[-1:] * (at_once - len(some))
            found = self._ask(filled, max_new_tokens, first_number=start, **options)
            answered += found[: len(some)]
        return answered

    def _check(self, questions: Sequence[str]) -> None:
        """Raises what is wrong with a question before the first is answered."""
        if not questions:
            raise InputError("no questions were given: there is nothing to answer")
        config = self._model.model.config
        token_ids = PromptEncoder(self._model.tokenizer, config.vocab_size)
        for number, question in enumerate(questions):
            name = f"question {number}"
            num_tokens = len(token_ids.after(EMBED, question, begin=True, name=name))
            if num_tokens > config.max_position_embeddings:
                raise InputError(
                    f"{name} has {num_tokens} tokens, instruction included, but this model reads "
                    f"{config.max_position_embeddings} at most: shorten it"
                )

    def _ask(self, questions: list[str], max_new_tokens: int, **options: Any) -> list[RagAnswer]:
        context = self._model.model.config.max_position_embeddings
        found = self._model.encode_queries(
            questions, instruction=EMBED, max_length=context, get_cache="query" in self._cached
        )
        has_caches = isinstance(found, tuple)
        embeddings, query_caches = found if has_caches else (found, [None] * len(questions))
        scores, numbers = self._index.search(embeddings, self._num_documents)
        prompts = [self._prompt_of(*each) for each in zip(questions, numbers, strict=True)]
        caches = self._caches_before(query_caches, numbers.tolist()) if self._cached else None
        answers = self._model.generate(prompts, max_new_tokens, cache=caches, **options)
        return [
            RagAnswer(answer, of_one.tolist(), of_scores.tolist())
            for answer, of_one, of_scores in zip(answers, numbers, scores, strict=True)
        ]

    def _prompt_of(self, question: str, numbers: np.ndarray) -> str:
        documents = join_documents([self._index.documents[number] for number in numbers])
        prompt = PROMPTS[self._way].format(query=question, documents="\n\n".join(documents))
        return prompt + self._answer_prefix

    def _caches_before(
        self, queries: Sequence[KVCache | None], numbers: Sequence[Sequence[int]]
    ) -> list[KVCache]:
        """Returns the cache before each prompt, given the question's own and its documents."""
        documents: dict[int, KVCache] = {}
        if "document" in self._cached:  # Each is read once, for however many questions.
            near = {number for of_one in numbers for number in of_one}
            documents = {number: self._index.cache_of(number) for number in near}
        theta = self._model.model.config.rope_theta
        caches = []
        for query, of_one in zip(queries, numbers, strict=True):
            blocks: list[KVCache] = []
            for what in self._cached:
                if what == "document":
                    blocks += [documents[number] for number in of_one]
                elif query is not None:
                    blocks.append(query)
            joined = concat_caches(blocks, theta, are_continued=self._positions == "continued")
            caches.append(joined)
        return caches


def concat_caches(blocks: Sequence[KVCache], rope_theta: float, *, are_continued: bool) -> KVCache:
    """Returns one cache of several texts that were read apart, as if one followed the other.

    Args:
      blocks: caches of one row, without padding, each read from position 0 on.
      rope_theta: of the model.
      are_continued: whether keys are turned to the positions that follow the block before. If not,
        what comes after the blocks has those positions all the same.
    """
    starts = np.cumsum([0, *(block.num_slots for block in blocks)])
    keys = [
        rotate_keys(np.asarray(block.keys), int(start) if are_continued else 0, rope_theta)
        for block, start in zip(blocks, starts, strict=False)
    ]
    slots = np.arange(starts[-1], dtype=np.int32)[None]
    values = np.concatenate([np.asarray(block.values) for block in blocks], axis=2)
    whole = np.concatenate(keys, axis=2)
    return KVCache(whole, values, slots, np.ones_like(slots), np.int32(starts[-1]))  # type: ignore


def rotate_keys(keys: np.ndarray, by: int, rope_theta: float) -> np.ndarray:
    """Returns rotated keys as they are `by` positions later: rotations add up."""
    if by == 0:
        return keys
    half = keys.shape[-1] // 2
    angles = by * rope_theta ** -(np.arange(half) / half)
    cosine, sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = np.split(keys.astype(np.float32), 2, axis=-1)
    parts = (first * cosine - second * sine, second * cosine + first * sine)
    return np.concatenate(parts, axis=-1).astype(keys.dtype)
