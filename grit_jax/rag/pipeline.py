"""Retrieval and generation with one model (GRIT, arXiv 2402.09906, section 5).

A question is embedded, the nearest documents are retrieved, and the model answers with them in its
prompt. The keys and values that embedding has computed can replace the text in the prompt. There
are six cache modes:

    query-prompt            question and documents as text
    document-prompt         documents and question as text
    query-cache             the question's cache, documents as text
    document-cache          the documents' caches, question as text
    query-document-cache    the question's cache, then the documents' caches
    document-query-cache    the documents' caches, then the question's cache

In the last two, question and documents do not attend to each other.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from jaxtyping import Int
import numpy as np

from grit_jax.inference.cache_utils import concat_caches
from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.prompt_encoder import InputError, PromptEncoder, document_texts
from grit_jax.models import KVCache
from grit_jax.rag.index import DocumentIndex
from grit_jax.text.templates import ASSISTANT, EMBED, USER

# The prompts of the paper, from its appendix on RAG.
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
# Questions whose caches are in memory together: they take memory for each token of the question and
# its documents.
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class RagAnswer:
    """An answer, and the documents that it was generated from.

    Attributes:
      answer: the text after the answer prefix.
      document_ids: indices in `DocumentIndex.documents`, the nearest document first.
      scores: inner product of each document with the question.
    """

    answer: str
    document_ids: list[int]
    scores: list[float]


class RagPipeline:
    """Answers questions from an index of documents.

    Args:
      model: embeds and generates.
      index: an index built with that model.
      cache_mode: one of `CACHE_MODES`.
      num_documents: documents for each question.
      positions: "continued" moves each cache to the positions after the one before; "restarted"
        keeps the positions of all caches from 0 on, as the original does.
      answer_prefix: the words that every answer begins with.

    Raises:
      InputError: an option is unknown.
    """

    def __init__(
        self,
        model: GritLM,
        index: DocumentIndex,
        cache_mode: str = "document-cache",
        *,
        num_documents: int = 1,
        positions: str = "continued",
        answer_prefix: str = ANSWER_PREFIX,
    ):
        if cache_mode not in CACHE_MODES:
            raise InputError(f"cache_mode={cache_mode!r} must be one of {', '.join(CACHE_MODES)}")
        if positions not in ("continued", "restarted"):
            raise InputError(f"positions={positions!r} must be 'continued' or 'restarted'")
        self._model, self._index, self._cache_mode = model, index, cache_mode
        self._num_documents, self._positions = num_documents, positions
        self._answer_prefix = answer_prefix
        # What is cached, in the order of the prompt: "query", "document", both or none.
        is_cached = cache_mode.endswith("-cache")
        self._cached = cache_mode.removesuffix("-cache").split("-") if is_cached else []

    def ask(
        self, questions: str | Sequence[str], max_new_tokens: int = 16, **options: Any
    ) -> list[RagAnswer]:
        """Returns the answer to each question.

        Args:
          questions: one question or several.
          max_new_tokens: maximum tokens of an answer.
          **options: the other arguments of `GritLM.generate`.

        Raises:
          InputError: a question is empty, or too long for the model with its documents.
        """
        questions = [questions] if isinstance(questions, str) else list(questions)
        self._check(questions)
        batch_size = min(len(questions), BATCH_SIZE if self._cached else len(questions))
        answers: list[RagAnswer] = []
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            # The last batch is padded with copies, so that its size compiles no program.
            padded = batch + batch[-1:] * (batch_size - len(batch))
            answered = self._answer_batch(padded, max_new_tokens, first_index=start, **options)
            answers += answered[: len(batch)]
        return answers

    def _check(self, questions: Sequence[str]) -> None:
        """Checks all questions before the first is answered."""
        if not questions:
            raise InputError("no questions were given: give at least one")
        config = self._model.model.config
        encoder = PromptEncoder(self._model.tokenizer, config.vocab_size)
        for number, question in enumerate(questions):
            name = f"question {number}"
            num_tokens = len(encoder.encode(question, EMBED, add_bos=True, add_eos=True, name=name))
            if num_tokens > config.max_position_embeddings:
                raise InputError(
                    f"{name} has {num_tokens} tokens, instruction included, but this model "
                    f"supports {config.max_position_embeddings}: shorten it"
                )

    def _answer_batch(
        self, questions: Sequence[str], max_new_tokens: int, **options: Any
    ) -> list[RagAnswer]:
        context_length = self._model.model.config.max_position_embeddings
        is_cached = "query" in self._cached
        encoded = self._model.encode_query(
            questions, max_length=context_length, get_cache=is_cached
        )
        embeddings, query_caches = encoded if is_cached else (encoded, [None] * len(questions))
        scores, document_ids = self._index.search(embeddings, self._num_documents)
        prompts = [self._prompt(*each) for each in zip(questions, document_ids, strict=True)]
        caches = None
        if self._cached:
            caches = self._prompt_caches(query_caches, document_ids.tolist())
        answers = self._model.generate(prompts, max_new_tokens, cache=caches, **options)
        return [
            RagAnswer(answer, own_ids.tolist(), own_scores.tolist())
            for answer, own_ids, own_scores in zip(answers, document_ids, scores, strict=True)
        ]

    def _prompt(self, question: str, document_ids: Int[np.ndarray, " documents"]) -> str:
        texts = document_texts([self._index.documents[document_id] for document_id in document_ids])
        prompt = PROMPTS[self._cache_mode].format(query=question, documents="\n\n".join(texts))
        return prompt + self._answer_prefix

    def _prompt_caches(
        self, query_caches: Sequence[KVCache | None], document_ids: Sequence[Sequence[int]]
    ) -> list[KVCache]:
        """Returns the cache that precedes each prompt."""
        documents: dict[int, KVCache] = {}
        if "document" in self._cached:  # Each cache is read once, for all questions.
            distinct = {document_id for own_ids in document_ids for document_id in own_ids}
            documents = {each: self._index.cache_of(each) for each in distinct}
        rope_theta = self._model.model.config.rope_theta
        caches = []
        for query_cache, own_ids in zip(query_caches, document_ids, strict=True):
            parts: list[KVCache] = []
            for part in self._cached:
                if part == "document":
                    parts += [documents[document_id] for document_id in own_ids]
                elif query_cache is not None:
                    parts.append(query_cache)
            continue_positions = self._positions == "continued"
            caches.append(concat_caches(parts, rope_theta, continue_positions=continue_positions))
        return caches
