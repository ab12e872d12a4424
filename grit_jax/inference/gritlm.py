"""`GritLM`: one model that embeds and generates, as a user holds it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import copy
import dataclasses
import functools
import os
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float64
import numpy as np
from rich.console import Console
from rich.progress import Progress

from grit_jax.arithmetic import ceil_div
from grit_jax.conversion import open_model
from grit_jax.conversion.stored_tokenizer import find_end_tokens, find_tokenizer
from grit_jax.inference.batch_packing import TOKENS_PER_DEVICE
from grit_jax.inference.encode import Encoder
from grit_jax.inference.generate import Generator, Request
from grit_jax.inference.loading import load_module
from grit_jax.inference.prompt_encoder import (
    InputError,
    PromptEncoder,
    TextLike,
    as_stop_strings,
    as_texts,
    fit,
)
from grit_jax.inference.results import GenerationResult, check_room, complete, in_batches, pieces
from grit_jax.inference.sampling import Sampling
from grit_jax.inference.score import Scorer, as_continuations
from grit_jax.models import Decoder, KVCache
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.processes import is_primary
from grit_jax.rag.documents import join_documents
from grit_jax.sharding import batch_shards, make_mesh
from grit_jax.text.tokenizer import Tokenizer

# Texts from which on their progress is shown.
SHOWN_FROM = 256
# Tokens that are made before their text is shown.
TOKENS_STREAMED = 4


class GritLM:
    """A model on the devices, that embeds texts and continues prompts.

    Args:
      model: the Flax module.
      mesh: the devices that its parameters lie on.
      tokenizer: what strings are read with; None for a model that reads token ids alone.
      end_tokens: tokens that end an answer; by default the tokenizer's `</s>`.
      attention: the pattern it was trained in: "bbcc", "cbcc" or "cccc".
      pooling: "mean", "weightedmean", "lasttoken" or "cls".
      normalized: whether embeddings are scaled to length 1.

    Attributes:
      model: the Flax module: token ids to hidden states, hidden states to logits.
      mesh: the devices that its parameters lie on.

    Raises:
      ValueError: the pattern or the pooling is unknown.
    """

    def __init__(
        self,
        model: Decoder,
        mesh: Mesh,
        tokenizer: Tokenizer | None = None,
        *,
        end_tokens: Sequence[int] | None = None,
        attention: str = "bbcc",
        pooling: str = "mean",
        normalized: bool = True,
    ):
        self.model = model
        self.mesh = mesh
        self._token_ids = PromptEncoder(tokenizer, model.config.vocab_size)
        if end_tokens is None:
            end_tokens = [] if tokenizer is None else [tokenizer.eos_id]
        self._end_tokens = tuple(end_tokens)
        self._embedding = EmbeddingSpec(attention=attention, pooling=pooling, normalize=normalized)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        dtype: str = "bfloat16",
        linear_dtype: str | None = None,
        attention: str | None = None,
        pooling: str | None = None,
        normalized: bool = True,
        tokenizer: str | os.PathLike | None = None,
        mesh: Mesh | None = None,
        base: str | os.PathLike | None = None,
    ) -> "GritLM":
        """Returns the model at `path`, its parameters read straight to where they belong.

        Args:
          path: a Hugging Face folder, a GGUF file, a checkpoint, or a run's folder (of which the
            newest checkpoint is taken); the latter two may be in a bucket, gs://BUCKET/FOLDER.
            Low-rank updates are added to the weights that they are of.
          dtype: "bfloat16" or "float32", of the parameters and of the computation.
          linear_dtype: "int8" rounds the weights of linear layers as they are read, to take half
            the memory of bfloat16; None leaves them in `dtype`.
          attention: the pattern it was trained in. Checkpoints of runs, and what was made of them,
            say so themselves; others have "bbcc".
          pooling: of its embeddings, alike; others have "mean".
          normalized: whether embeddings are scaled to length 1.
          tokenizer: path of a SentencePiece model or a tokenizer.json, or "mistral"; by default the
            one that lies with the model, else Mistral's for a model of as many pieces.
          mesh: the devices, by default all of them.
          base: where the model of low-rank updates lies now, if it has moved.

        Raises:
          ConversionError: there is no model at `path`, or it is damaged.
          BucketError: its bucket cannot be used.
          FileNotFoundError: there is no such tokenizer.
          TokenizerError: its files are no tokenizer, or do not say what begins and ends a text.
          MeshError: the mesh does not divide the model.
          ValueError: the type, the pattern or the pooling is unknown.
        """
        EmbeddingSpec.from_fields({}, attention, pooling)  # Checked before anything is read.
        mesh = make_mesh() if mesh is None else mesh
        stored = open_model(path, base=base)
        found = find_tokenizer(stored, tokenizer)
        module = load_module(stored, dtype, mesh, linear_dtype)
        spec = EmbeddingSpec.from_fields(stored.fields, attention, pooling)
        return cls(
            module,
            mesh,
            found,
            end_tokens=find_end_tokens(stored),
            normalized=normalized,
            attention=spec.attention,
            pooling=spec.pooling,
        )

    @property
    def attention(self) -> str:
        """The pattern that it embeds and generates in."""
        return self._embedding.attention

    @property
    def pooling(self) -> str:
        """How hidden states become an embedding."""
        return self._embedding.pooling

    @property
    def tokenizer(self) -> Tokenizer:
        """What strings are read with.

        Raises:
          InputError: the model has none.
        """
        return self._token_ids.tokenizer

    def encode(
        self,
        texts: TextLike | Sequence[TextLike],
        batch_size: int = 256,
        max_length: int = 512,
        instruction: TextLike = "",
        embed_instruction: bool = False,
        get_cache: bool = False,
        convert_to_tensor: bool = False,
        recast: bool = False,
        add_special_tokens: bool = True,
        *,
        truncate: bool = False,
    ) -> Any:
        """Returns the embedding of each text: float32 [texts, size], or [size] of one alone.

        Texts are sorted by length and packed into rows. An embedding is the same whatever is read
        beside it.

        Args:
          texts: strings, or token ids, which are read as they are, without `<s>`.
          batch_size: bounds memory: a call of the devices has no more tokens, padding included,
            than so many texts of `max_length`, and no more than keep a device busy
            (`rows.TOKENS_PER_DEVICE`). It may have more texts, where they are short.
          max_length: tokens that a text may have, `<s>` and instruction included.
          instruction: what stands before each text, ready-made as in
            "<|user|>\\nGiven a question, find its answer\\n<|embed|>\\n" (see
            `text.templates.embedding_prefix`). Its tokens and `<s>` are read, and not pooled by
            "mean" and "weightedmean". Without an instruction all tokens are pooled.
          embed_instruction: whether instructions are pooled all the same.
          get_cache: whether to return also, for each text, a `KVCache` of one row with its keys and
            values, to generate on top of. They take memory for each token of all texts.
          convert_to_tensor: return JAX arrays on the devices in the place of NumPy's.
          recast: round embeddings to the type of the model; JAX arrays are also of this type.
          add_special_tokens: whether `<s>` goes before strings.
          truncate: cut what is longer than `max_length`, and warn how many texts were.

        Raises:
          InputError: a text is empty, no string nor token ids, or too long; the message names it.
        """
        listed, is_one = as_texts(texts)
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} must be positive")
        read = [
            self._token_ids.after(instruction, text, begin=add_special_tokens, name=f"text {i}")
            for i, text in enumerate(listed)
        ]
        read = fit(read, max_length, self.model.config.max_position_embeddings, truncate=truncate)
        spec = dataclasses.replace(self._embedding, pool_instruction=embed_instruction)
        places = self._places(batch_size, max_length)
        embed = self._encoder.embed_with_caches if get_cache else self._encoder.embed
        with _progress("Embedding", len(read)) as done:
            found = embed(read, spec, places, done)
        embeddings, caches = found if isinstance(found, tuple) else (found, None)
        if recast:
            embeddings = embeddings.astype(self.model.config.dtype)
        if convert_to_tensor:
            whole = NamedSharding(self.mesh, PartitionSpec())
            embeddings, caches = jax.device_put((embeddings, caches), whole)
        elif recast:
            embeddings = embeddings.astype("float32")
        if is_one:
            embeddings = embeddings[0]
        return (embeddings, caches) if get_cache else embeddings

    def encode_queries(self, queries: TextLike | Sequence[TextLike], **options: Any) -> Any:
        """Returns the embeddings of queries; the arguments are those of `encode`."""
        return self.encode(queries, **options)

    def encode_corpus(
        self,
        corpus: TextLike | Mapping[str, str] | Sequence[TextLike] | Sequence[Mapping[str, str]],
        **options: Any,
    ) -> Any:
        """Returns the embeddings of documents; the other arguments are those of `encode`.

        Args:
          corpus: texts, or dictionaries with "text" and maybe "title", which goes before it.
          **options: see `encode`.
        """
        return self.encode(join_documents(corpus), **options)

    def generate(
        self,
        prompts: TextLike | Sequence[TextLike],
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = (),
        seed: int = 0,
        cache: KVCache | Sequence[KVCache] | None = None,
        add_special_tokens: bool = True,
        batch_size: int = 32,
        first_number: int = 0,
    ) -> Any:
        """Returns the continuation of each prompt: a string of a string, token ids of token ids.

        The prompt itself, the token that ends a text and what comes after it are left out. Of one
        prompt alone there is one answer, else a list.

        Args:
          prompts: strings, ready-made as in "<|user|>\\nWho are you?\\n<|assistant|>\\n" (see
            `text.templates.chat_prompt`), or token ids, which are read as they are.
          max_new_tokens: of an answer. Prompt and answer must fit the model's context together.
          temperature: 0 takes the likeliest token each time; above, tokens are drawn.
          top_k: draw from so many of the likeliest tokens.
          top_p: draw from the likeliest tokens that have this probability together.
          min_p: draw from tokens that are at least this times as likely as the likeliest.
          repetition_penalty: above 1 makes tokens of prompt and answer less likely.
          stop: strings before which an answer ends. Token ids end behind the token that completes
            one.
          seed: of what is drawn. The same seed, number of the prompt and options give the same
            answer, whatever the other prompts are.
          cache: what is read before each prompt, one for each, as `encode(..., get_cache=True)`
            returns them. No `<s>` goes before the prompts then.
          add_special_tokens: whether `<s>` goes before strings.
          batch_size: prompts that are continued together.
          first_number: of the first prompt, where a list is continued in several calls.

        Raises:
          InputError: a prompt is empty, no string nor token ids, or too long; the message names it.
          ValueError: an option is impossible.
        """
        listed, is_one = as_texts(prompts)
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} must be positive")
        stop = as_stop_strings(stop)
        sampling = Sampling.of(temperature, top_k, top_p, min_p, repetition_penalty)
        begin = add_special_tokens and cache is None
        request = self._request(
            listed, max_new_tokens, sampling, seed, cache, begin=begin, first_number=first_number
        )
        answers = [self._answer(isinstance(text, str), stop) for text in listed]
        for numbers in in_batches(request.prompts, batch_size):
            part = request.part(numbers, min(batch_size, len(listed)))
            complete(self._generator, part, [answers[number] for number in numbers])
        found = [
            answer.text if isinstance(text, str) else answer.ids
            for text, answer in zip(listed, answers, strict=True)
        ]
        return found[0] if is_one else found

    def stream(
        self,
        prompt: TextLike,
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        stop: str | Sequence[str] | None = (),
        seed: int = 0,
        cache: KVCache | Sequence[KVCache] | None = None,
        add_special_tokens: bool = True,
    ) -> Iterator[str]:
        """Returns an iterator over the text that `generate` would return, piece after piece.

        A piece ends with a whole character, and before what may become a stop string. The
        arguments and the errors, which are raised at once, are those of `generate`.
        """
        (listed, _), stop = as_texts(prompt), as_stop_strings(stop)
        if len(listed) != 1:
            raise InputError(f"one prompt is streamed at a time, not {len(listed)}")
        sampling = Sampling.of(temperature, top_k, top_p, min_p, repetition_penalty)
        begin = add_special_tokens and cache is None
        request = self._request(listed, max_new_tokens, sampling, seed, cache, begin=begin)
        return pieces(self._generator, request, self._answer(True, stop), TOKENS_STREAMED)

    def score(
        self,
        prompts: Sequence[TextLike],
        continuations: Sequence[TextLike],
        *,
        add_special_tokens: bool = True,
        batch_size: int = 256,
    ) -> tuple[Float64[np.ndarray, " pairs"], Bool[np.ndarray, " pairs"]]:
        """Returns of each pair how likely the continuation is behind the prompt, read causally.

        The first array has log-likelihoods in nats, summed over the continuation's tokens. The
        second says whether `generate` would begin with the continuation: each of its tokens is the
        likeliest in its place. Pairs are packed into rows, and those of one prompt that differ in
        their last token alone are read together.

        Args:
          prompts: strings or token ids; a prompt may be there several times.
          continuations: one for each prompt, of the same kind. Strings are tokenised together with
            their prompt. The continuation has all tokens from the first on that is not the prompt's
            alone, so that each of its characters is scored, once. Where a token has characters of
            both, as of "The ab" and "stract", or of "is " and "Paris", those of the prompt are
            scored with it.
          add_special_tokens: whether `<s>` goes before prompts that are strings.
          batch_size: bounds memory, as so many texts of 512 tokens do in `encode`.

        Raises:
          InputError: there are none; a text is empty, no string nor token ids, or a pair is too
            long; the message names it.
        """
        context = self.model.config.max_position_embeddings
        pairs = as_continuations(
            self._token_ids, prompts, continuations, context, begin=add_special_tokens
        )
        with _progress("Scoring", len(pairs)) as done:
            return self._scorer.score(pairs, self._places(batch_size, 512), done)

    def unnormalized(self) -> "GritLM":
        """Returns this model with embeddings as they are pooled, whatever their length.

        Parameters are shared, and what has been compiled by now.
        """
        other = copy.copy(self)
        other._embedding = dataclasses.replace(self._embedding, normalized=False)
        return other

    def _places(self, batch_size: int, length: int) -> int:
        """Returns the most places of a call on one device, for so many texts of a length."""
        return min(TOKENS_PER_DEVICE, ceil_div(batch_size * length, batch_shards(self.mesh)))

    def _request(
        self,
        prompts: Sequence[TextLike],
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        cache: KVCache | Sequence[KVCache] | None,
        *,
        begin: bool,
        first_number: int = 0,
    ) -> Request:
        numbers = range(first_number, first_number + len(prompts))
        ids = [
            self._token_ids.after("", prompt, begin=begin, name=f"prompt {number}").tokens
            for number, prompt in zip(numbers, prompts, strict=True)
        ]
        caches = [cache] if isinstance(cache, KVCache) else cache
        request = Request(
            ids, numbers, max_new_tokens, self._end_tokens, sampling, seed, caches, len(ids)
        )
        check_room(request, self.model.config.max_position_embeddings)
        return request

    def _answer(self, is_text: bool, stop: Sequence[str]) -> GenerationResult:
        needs_text = is_text or stop
        return GenerationResult(self._end_tokens, self.tokenizer if needs_text else None, stop)

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self.model, self.mesh)

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.model, self.mesh)

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.model, self.mesh)


@contextlib.contextmanager
def _progress(title: str, num_texts: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told how many texts are done, and shows it where they are many."""
    is_hidden = num_texts < SHOWN_FROM or not is_primary()
    with Progress(console=Console(stderr=True), disable=is_hidden) as progress:
        task = progress.add_task(title, total=num_texts)
        yield functools.partial(progress.advance, task)
