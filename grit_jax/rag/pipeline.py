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

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
from typing import Any
import warnings

import numpy as np

from grit_jax.inference.cache_utils import concat_caches
from grit_jax.inference.gritlm import Chat, GritLM
from grit_jax.inference.prompt_encoder import (
    InputError,
    PromptEncoder,
    as_list,
    check_count,
    document_text,
    prompt_of_instruction,
)
from grit_jax.models import KVCache
from grit_jax.rag.documents import Document, document_id
from grit_jax.rag.index import DocumentIndex

# What the user's message consists of, separated by empty lines. What is cached precedes it.
MESSAGES = {
    "query-prompt": ("query", "documents", "after_query"),
    "document-prompt": ("documents", "query", "after_document"),
    "query-cache": ("documents", "after_query"),
    "document-cache": ("query", "after_document"),
    "query-document-cache": ("after_query",),
    "document-query-cache": ("after_document",),
}
CACHE_MODES = tuple(MESSAGES)
# Questions whose caches are in memory together: they take memory for each token of the question and
# its documents.
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class RagPrompt:
    """The words of a prompt, besides the question and the documents.

    Attributes:
      after_query: what to do, if the question precedes the documents.
      after_document: what to do, if the documents precede the question.
      number_documents: whether documents in the text of the prompt are numbered: [1], [2], ...
      answer_prefix: the words that every answer begins with.
    """

    after_query: str
    after_document: str
    number_documents: bool = False
    answer_prefix: str = ""


_ANSWER = (
    "Answer the question from the documents above. If they do not contain the answer, say that you "
    "do not know."
)
ANSWER_PROMPT = RagPrompt(after_query=_ANSWER, after_document=_ANSWER, number_documents=True)
# From the paper's appendix on RAG. The paper retrieves 1 document and generates 16 tokens.
PAPER_PROMPT = RagPrompt(
    after_query="Optionally using the prior context answer the query prior to it",
    after_document="Answer the prior query while optionally using the context prior to it",
    answer_prefix="The answer is",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A document that an answer was generated from.

    Attributes:
      document: the document with all its fields.
      score: inner product of its embedding with the question's.
    """

    document: Document
    score: float

    @property
    def id(self) -> str:
        """The document's ID; without one, a hash of its title and text."""
        return document_id(self.document)


@dataclasses.dataclass(frozen=True)
class RagAnswer:
    """An answer, and the documents that it was generated from.

    Attributes:
      answer: the text after the answer prefix.
      sources: the documents in the prompt, the nearest first.
    """

    answer: str
    sources: list[Source]


@dataclasses.dataclass(frozen=True)
class _Request:
    """What the model is asked: a chat, the cache that precedes it, and the documents in both."""

    messages: Chat
    cache: KVCache | None
    sources: list[Source]


class RagPipeline:
    """Answers questions from an index of documents.

    Args:
      model: embeds and generates.
      index: an index built with that model.
      cache_mode: one of `CACHE_MODES`. By default "document-cache" if the index stores caches, or
        else "document-prompt".
      num_documents: documents for each question, at most. Fewer are used if the index has fewer,
        or, with a warning, if more do not fit the model's context.
      instruction: the instruction for questions in plain words, "" for none. By default the one
        stored in the index, or the model's.
      system: system message, which precedes the prompt.
      prompt: the words of the prompt: `ANSWER_PROMPT`, `PAPER_PROMPT` or others.
      positions: "continued" moves each cache to the positions after the one before; "restarted"
        keeps the positions of all caches from 0 on, as the original does.

    Attributes:
      prompt: the words of the prompt.

    Raises:
      InputError: an option is unknown or invalid.
    """

    def __init__(
        self,
        model: GritLM,
        index: DocumentIndex,
        cache_mode: str | None = None,
        *,
        num_documents: int = 3,
        instruction: str | None = None,
        system: str | None = None,
        prompt: RagPrompt = ANSWER_PROMPT,
        positions: str = "continued",
    ):
        if cache_mode is None:
            cache_mode = "document-cache" if index.has_caches else "document-prompt"
        if cache_mode not in CACHE_MODES:
            raise InputError(f"cache_mode={cache_mode!r} must be one of {', '.join(CACHE_MODES)}")
        if positions not in ("continued", "restarted"):
            raise InputError(f"positions={positions!r} must be 'continued' or 'restarted'")
        scaling = model.model.config.rope_scaling
        moves_keys = "cache" in cache_mode and positions == "continued"
        if moves_keys and scaling is not None and scaling.depends_on_length:
            raise InputError(
                f"keys with rotary embeddings of type {scaling.rope_type!r} cannot be moved: pass "
                "positions='restarted' or cache_mode='document-prompt'"
            )
        model.model.check_has_head()
        check_count("num_documents", num_documents)
        if not isinstance(prompt, RagPrompt):
            raise InputError(f"prompt is of type {type(prompt).__name__}: give a RagPrompt")
        if not len(index):
            raise InputError(f"{index.folder} has no documents: run grit-jax rag build")
        self._model, self._index, self._cache_mode = model, index, cache_mode
        self._num_documents = min(num_documents, len(index))
        self.prompt, self._system, self._positions = prompt, system, positions
        if instruction is None:
            stored = index.settings["query_prompt"]
            self._query_prompt = model.embedding_spec.query_prompt if stored is None else stored
        else:
            self._query_prompt = prompt_of_instruction(instruction, model.embedding_spec)
        # What is cached, in the order of the prompt: "query", "document", both or none.
        is_cached = cache_mode.endswith("-cache")
        self._cached = cache_mode.removesuffix("-cache").split("-") if is_cached else []
        self._encoder = PromptEncoder(model.tokenizer, model.model.config.vocab_size)

    def ask(
        self,
        questions: str | Sequence[str],
        max_new_tokens: int = 256,
        *,
        history: Chat = (),
        **options: Any,
    ) -> list[RagAnswer]:
        """Returns the answer to each question.

        Args:
          questions: one question or several.
          max_new_tokens: maximum tokens of an answer.
          history: earlier messages of the conversation, `[{"role": "user", "content": ...},
            {"role": "assistant", "content": ...}, ...]`. Documents are retrieved for the question
            alone; those of earlier questions are not in the prompt.
          **options: the other arguments of `GritLM.generate`.

        Raises:
          InputError: a question is empty, or too long for the model with its documents.
        """
        questions = [questions] if isinstance(questions, str) else as_list(questions, "questions")
        self._check(questions, history)
        batch_size = min(len(questions), BATCH_SIZE if self._cached else len(questions))
        answers: list[RagAnswer] = []
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            requests = self._requests(batch, batch_size, start, history, max_new_tokens)
            # The last batch is padded with copies, so that its size compiles no program.
            padded = requests + requests[-1:] * (batch_size - len(batch))
            texts = self._model.chat(
                [request.messages for request in padded],
                max_new_tokens,
                cache=[request.cache for request in padded] if self._cached else None,
                answer_prefix=self.prompt.answer_prefix,
                first_index=start,
                **options,
            )
            answers += [
                RagAnswer(text, request.sources)
                for text, request in zip(texts, requests, strict=False)
            ]
        return answers

    def stream(
        self, question: str, max_new_tokens: int = 256, *, history: Chat = (), **options: Any
    ) -> tuple[list[Source], Iterator[str]]:
        """Returns the sources of one answer, and an iterator over the answer's text.

        Args:
          question: the question.
          max_new_tokens: maximum tokens of the answer.
          history: see `ask`.
          **options: see `GritLM.stream`.

        Raises:
          InputError: see `ask`; raised by the call itself, before the first text.
        """
        self._check([question], history)
        (request,) = self._requests([question], 1, 0, history, max_new_tokens)
        text = self._model.stream_chat(
            request.messages,
            max_new_tokens,
            cache=request.cache,
            answer_prefix=self.prompt.answer_prefix,
            **options,
        )
        return request.sources, text

    def _check(self, questions: Sequence[str], history: Chat) -> None:
        """Checks all questions before the first is answered."""
        if history and "query" in self._cached:
            raise InputError(
                f"cache_mode={self._cache_mode!r} puts the question before the conversation: use "
                "document-cache or document-prompt"
            )
        context_length = self._model.model.config.max_position_embeddings
        for number, question in enumerate(questions):
            name = f"question {number}"
            text = self._encoder.encode(
                question, self._query_prompt, add_bos=True, add_eos=True, name=name
            )
            if len(text) > context_length:
                raise InputError(
                    f"{name} has {len(text)} tokens, instruction included, but this model "
                    f"supports {context_length}: shorten it"
                )

    def _requests(
        self,
        questions: Sequence[str],
        batch_size: int,
        first_index: int,
        history: Chat,
        max_new_tokens: int,
    ) -> list[_Request]:
        """Retrieves the documents of each question, and returns what the model is asked."""
        is_cached = "query" in self._cached
        encoded = self._model.encode(
            [*questions, *[questions[-1]] * (batch_size - len(questions))],
            instruction=self._query_prompt,
            max_length=self._model.model.config.max_position_embeddings,
            get_cache=is_cached,
        )
        embeddings, query_caches = encoded if is_cached else (encoded, [None] * batch_size)
        scores, positions = self._index.search(embeddings, self._num_documents)
        scores, positions = scores[: len(questions)], positions[: len(questions)]
        document_caches: dict[int, KVCache] = {}
        if "document" in self._cached:  # Each cache is read once, for all questions.
            distinct = np.unique(positions).tolist()
            document_caches = {each: self._index.cache_of(each) for each in distinct}
        requests = []
        for number, question in enumerate(questions):
            sources = [
                Source(self._index.documents[position], float(score))
                for position, score in zip(positions[number], scores[number], strict=True)
            ]
            own_caches = [document_caches.get(position) for position in positions[number].tolist()]
            request = self._fitting_request(
                question,
                sources,
                {"query": [query_caches[number]], "document": own_caches},
                history,
                max_new_tokens,
                f"question {first_index + number}",
            )
            requests.append(request)
        return requests

    def _fitting_request(
        self,
        question: str,
        sources: list[Source],
        caches: Mapping[str, Sequence[Any]],
        history: Chat,
        max_new_tokens: int,
        name: str,
    ) -> _Request:
        """Returns a prompt with as many documents and earlier messages as fit the context."""
        context_length = self._model.model.config.max_position_embeddings
        num_tokens = 0
        # First the farthest documents are left out, then the earliest question and answer.
        options = [(count, 0) for count in range(len(sources), 0, -1)]
        options += [(1, start) for start in range(2, len(history) + 1, 2)]
        for count, start in options:
            messages = self._messages(question, sources[:count], history[start:])
            own = {"query": caches["query"], "document": caches["document"][:count]}
            parts = [cache for part in self._cached for cache in own[part]]
            prompt = self._encoder.encode_chat(
                messages,
                is_continuation=bool(parts),
                name=name,
                answer_prefix=self.prompt.answer_prefix,
            )
            num_tokens = len(prompt) + sum(cache.num_slots for cache in parts)
            if num_tokens + max_new_tokens <= context_length:
                if count < len(sources) or start:
                    warnings.warn(
                        f"{name}: only {count} of {len(sources)} documents and the last "
                        f"{len(history) - start} of {len(history)} earlier messages fit the "
                        f"model's context of {context_length}",
                        UserWarning,
                        stacklevel=4,
                    )
                return _Request(messages, self._join(parts), sources[:count])
        raise InputError(
            f"{name} has {num_tokens} tokens with its nearest document, which with "
            f"max_new_tokens={max_new_tokens} exceeds the model's context of {context_length}: "
            "shorten it, lower max_new_tokens, or build the index from shorter documents"
        )

    def _messages(self, question: str, sources: Sequence[Source], history: Chat) -> Chat:
        texts = [document_text(source.document, "a document") for source in sources]
        if self.prompt.number_documents:
            texts = [f"[{number}] {text}" for number, text in enumerate(texts, 1)]
        parts = {
            "query": question,
            "documents": "\n\n".join(texts),
            "after_query": self.prompt.after_query,
            "after_document": self.prompt.after_document,
        }
        content = "\n\n".join(parts[name] for name in MESSAGES[self._cache_mode])
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, *history, {"role": "user", "content": content}]

    def _join(self, caches: Sequence[KVCache]) -> KVCache | None:
        """Returns the cache that precedes a prompt."""
        if not caches:
            return None
        continue_positions = self._positions == "continued"
        frequencies = self._model.model.config.layer_rotary_frequencies()
        return concat_caches(caches, frequencies, continue_positions=continue_positions)
