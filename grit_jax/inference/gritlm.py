"""`GritLM`: one model that embeds and generates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import copy
import dataclasses
import functools
import os
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float64, Int
import numpy as np
from rich.console import Console
from rich.progress import Progress

from grit_jax.arithmetic import bucket_size, ceil_div
from grit_jax.compilation_cache import use_user_cache
from grit_jax.conversion import open_model
from grit_jax.conversion.stored_tokenizer import find_end_tokens, find_tokenizer
from grit_jax.inference.batch_packing import TOKENS_PER_DEVICE
from grit_jax.inference.encode import Encoder
from grit_jax.inference.generate import Generator, Request, prompt_widths
from grit_jax.inference.loading import load_module
from grit_jax.inference.other_names import ENCODE, ENCODE_PLAIN, GENERATE, LOAD, accepts
from grit_jax.inference.prompt_encoder import (
    InputError,
    PromptEncoder,
    TextLike,
    as_chat_list,
    as_stop_strings,
    as_text_list,
    check_count,
    document_texts,
    fit_to_length,
    prompt_of_instruction,
)
from grit_jax.inference.results import (
    GenerationResult,
    NotFiniteError,
    batches_by_length,
    check_fits_context,
    generate_results,
    stream_text,
)
from grit_jax.inference.sampling import Sampling, as_sampling
from grit_jax.inference.score import Scorer, as_continuations
from grit_jax.models import Decoder, KVCache
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.processes import is_primary, skip_absent_tpu
from grit_jax.sharding import batch_shards, make_mesh
from grit_jax.text.chat_template import ChatTemplate
from grit_jax.text.tokenizer import Tokenizer, TokenizerError

DTYPES = ("bfloat16", "float32")
# A progress bar is shown from this many texts on.
PROGRESS_MIN_TEXTS = 256
# Tokens that are decoded before their text is streamed.
STREAM_STEPS = 4
# JAX's random keys of 32 bits ignore the higher bits of larger seeds.
LARGEST_SEED = 2**32 - 1
# Texts of `score` count as this long when `batch_size` bounds the memory.
SCORE_LENGTH = 512

# One document or text, or several.
Corpus = TextLike | Mapping[str, Any] | Sequence[TextLike] | Sequence[Mapping[str, Any]]
# Messages of one chat: {"role": "system" | "user" | "assistant", "content": ...}.
Chat = Sequence[Mapping[str, str]]


class GritLM:
    """One model that embeds texts and generates text.

    `from_pretrained` loads a model. `encode_query`, `encode_document` and `chat` format their
    inputs as in training. `encode` and `generate` take prompts that are formatted already, as in
    the package `gritlm`.

    Threads: on one device, all methods may be called from several threads; the device runs the
    calls one after the other and does not batch them together. On several devices, call from one
    thread at a time: devices that start programs with collectives in different orders deadlock.

    Args:
      model: the Flax module.
      mesh: the devices that hold its parameters.
      tokenizer: tokenizer for strings, or None if the model takes only token ids.
      end_tokens: tokens that end generated text; by default the tokenizer's `</s>`.
      attention: the attention pattern it was trained with: "bbcc", "cbcc" or "cccc".
      pooling: "mean", "weightedmean", "lasttoken" or "cls".
      normalized: whether embeddings are scaled to length 1.

    Attributes:
      model: the Flax module: token ids to hidden states, hidden states to logits.
      mesh: the devices that hold its parameters.
      embedding_spec: attention, pooling, normalization and prompts.

    Raises:
      ValueError: the attention pattern or the pooling is unknown.
    """

    def __new__(cls, *arguments: Any, **keywords: Any) -> Self:
        """Refuses a path, which is how models of other packages are loaded."""
        if arguments and isinstance(arguments[0], str | os.PathLike):
            path = os.fspath(arguments[0])
            raise InputError(f"GritLM takes a Flax module: call GritLM.from_pretrained({path!r})")
        return super().__new__(cls)

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
        self.embedding_spec = EmbeddingSpec(
            attention=attention, pooling=pooling, normalize=normalized
        )
        self._prompt_encoder = PromptEncoder(tokenizer, model.config.vocab_size)
        if end_tokens is None:
            end_tokens = [] if tokenizer is None else [tokenizer.eos_id]
        self._given_end_tokens = tuple(end_tokens)

    @classmethod
    @accepts(LOAD)
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        dtype: Any = "bfloat16",
        linear_dtype: str | None = None,
        attention: str | None = None,
        pooling: str | None = None,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        normalized: bool | None = None,
        tokenizer: str | os.PathLike | None = None,
        mesh: Mesh | None = None,
        base: str | os.PathLike | None = None,
    ) -> GritLM:
        """Loads a model; each device reads only its own shards of the parameters.

        Compiled programs are kept in ~/.cache/grit_jax/compiled for later processes, unless JAX is
        configured otherwise (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE).

        Args:
          path: a Hugging Face folder, the name OWNER/MODEL of a model on the Hugging Face Hub (or
            hf:OWNER/MODEL), a GGUF file, a checkpoint, or the folder of a run, whose newest
            checkpoint is loaded. Checkpoints and runs may be in a bucket, gs://BUCKET/FOLDER. LoRA
            checkpoints and PEFT adapters are merged into their base model.
          dtype: "bfloat16" or "float32", of the parameters and of the computation; or this type of
            JAX, NumPy or PyTorch.
          linear_dtype: "int8" quantizes the weights of linear layers while loading, which halves
            the memory of bfloat16; None keeps them in `dtype`.
          attention: the attention pattern it was trained with. By default the one that a checkpoint
            of grit-jax stores, or "bbcc".
          pooling: how embeddings are pooled. By default the stored pooling, or "mean".
          query_instruction: what precedes a query in `encode_query`, in plain words. By default the
            stored one.
          document_instruction: what precedes a document in `encode_document`, in plain words. By
            default the stored one.
          normalized: whether embeddings are scaled to length 1. By default as stored, or True.
          tokenizer: "mistral", or the path of a SentencePiece model, a tokenizer.json, a GGUF file
            or a folder with a tokenizer. By default the tokenizer stored with the model, or, with a
            warning, Mistral's for a Mistral or Mixtral of the same vocabulary size without one.
          mesh: the devices, by default all of them (see `grit_jax.sharding.make_mesh`).
          base: path or name of the base model of a LoRA checkpoint or PEFT adapter, if it is not
            the one that is stored there.

        Raises:
          ConversionError: there is no model at `path`, it is damaged, or weights are not finite.
          BucketError: its bucket cannot be used.
          FileNotFoundError: there is no such tokenizer.
          TokenizerError: its files are not a tokenizer, or do not name its special tokens.
          MeshError: the mesh does not divide the model's sizes.
          ValueError: the dtype, the attention pattern or the pooling is unknown, or an instruction
            has the model's markers.
        """
        make_spec = functools.partial(
            EmbeddingSpec.from_fields,
            attention=attention,
            pooling=pooling,
            query_instruction=query_instruction,
            document_instruction=document_instruction,
            normalize=normalized,
        )
        make_spec({})  # Fails before anything is loaded.
        dtype = _dtype_name(dtype)
        skip_absent_tpu()
        use_user_cache()
        mesh = make_mesh() if mesh is None else mesh
        stored = open_model(path, base=base)
        model = cls(
            load_module(stored, dtype, mesh, linear_dtype),
            mesh,
            find_tokenizer(stored, tokenizer),
            end_tokens=find_end_tokens(stored),
        )
        model.embedding_spec = make_spec(stored.fields)
        return model

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          InputError: the model has no tokenizer.
        """
        return self._prompt_encoder.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template that the model was trained with, None for GRIT's format.

        Raises:
          InputError: the model has no tokenizer.
          TokenizerError: the template is not valid.
        """
        return self._prompt_encoder.chat_template

    @accepts(ENCODE_PLAIN)
    def encode_query(
        self,
        texts: TextLike | Sequence[TextLike],
        instruction: str | None = None,
        **options: Any,
    ) -> Any:
        """Returns the embedding of each query, formatted as in training.

        Args:
          texts: one query or several.
          instruction: the task in plain words, such as "Given a question, find its answer". None
            takes the one stored with the model (`embedding_spec.query_prompt`), "" takes none.
          **options: the other arguments of `encode`.

        Returns:
          See `encode`.

        Raises:
          InputError: the instruction has the model's markers, or see `encode`.
        """
        prompt = self._prompt(instruction, self.embedding_spec.query_prompt)
        return self.encode(texts, instruction=prompt, **options)

    @accepts(ENCODE_PLAIN)
    def encode_document(self, texts: Corpus, instruction: str | None = None, **options: Any) -> Any:
        """Returns the embedding of each document, formatted as in training.

        Args:
          texts: one document or several: texts, or dictionaries with "text" and optionally "title",
            which precedes the text.
          instruction: the task in plain words; most models are trained without one for documents.
            None takes the one stored with the model (`embedding_spec.document_prompt`).
          **options: the other arguments of `encode`.

        Returns:
          See `encode`.

        Raises:
          InputError: the instruction has the model's markers, or see `encode`.
        """
        prompt = self._prompt(instruction, self.embedding_spec.document_prompt)
        return self.encode(document_texts(texts), instruction=prompt, **options)

    @accepts(ENCODE)
    def encode(
        self,
        texts: TextLike | Sequence[TextLike],
        batch_size: int = 256,
        max_length: int = 512,
        instruction: TextLike = "",
        embed_instruction: bool | None = None,
        get_cache: bool = False,
        convert_to_tensor: bool = False,
        recast: bool = False,
        add_special_tokens: bool = True,
        *,
        truncate: bool = False,
        normalize_embeddings: bool = False,
        show_progress_bar: bool | None = None,
    ) -> Any:
        """Returns the embedding of each text, with a ready-made instruction.

        Texts are sorted by length and packed into rows. An embedding does not depend on the other
        texts of the call.

        Args:
          texts: strings, or token ids, which are used as they are, without `<s>`.
          batch_size: bounds memory: a call of the model has at most as many tokens, padding
            included, as `batch_size` texts of `max_length`. It may have more texts if they are
            short, and fewer if a device is busy with fewer.
          max_length: maximum tokens of a text, including `<s>` and the instruction.
          instruction: precedes each text, with the model's markers, as in
            "<|user|>\\nGiven a question, find its answer\\n<|embed|>\\n" (see
            `grit_jax.text.templates.embedding_prefix`). Its tokens and `<s>` are attended to but
            not pooled by "mean" and "weightedmean". Without an instruction all tokens are pooled.
          embed_instruction: whether to pool the instruction as well. None follows the model: no for
            those of grit-jax, yes for most models of others.
          get_cache: whether to also return the `KVCache` of each text, to generate after it. Caches
            take memory for each token of all texts.
          convert_to_tensor: whether to return JAX arrays on the devices instead of NumPy arrays.
          recast: whether to round embeddings to the model's dtype; JAX arrays also have this dtype.
          add_special_tokens: whether to begin strings with `<s>` and end them with `</s>`, each if
            the tokenizer does (`adds_bos`, `adds_eos`).
          truncate: whether to truncate longer texts, with a warning.
          normalize_embeddings: whether to scale embeddings to length 1 if the model does not.
          show_progress_bar: None shows progress from 256 texts on.

        Returns:
          float32 [texts, size], or [size] for a single text; with `get_cache`, also a list of
          caches of one row.

        Raises:
          InputError: a text is empty, has the wrong type or is too long; the message names it.
          NotFiniteError: an embedding is NaN or infinite.
        """
        listed, is_one = as_text_list(texts)
        check_count("batch_size", batch_size)
        encoded = [
            self._prompt_encoder.encode(
                text,
                instruction,
                add_bos=add_special_tokens,
                add_eos=add_special_tokens,
                name=f"text {i}",
            )
            for i, text in enumerate(listed)
        ]
        encoded = fit_to_length(
            encoded,
            max_length,
            self.model.config.max_position_embeddings,
            num_end_tokens=[
                self._prompt_encoder.num_end_tokens(text) if add_special_tokens else 0
                for text in listed
            ],
            truncate=truncate,
        )
        spec = self.embedding_spec
        if embed_instruction is None:
            embed_instruction = spec.pool_instruction
        spec = dataclasses.replace(
            spec,
            pool_instruction=embed_instruction,
            normalize=spec.normalize or normalize_embeddings,
        )
        tokens_per_device = self._tokens_per_device(batch_size, max_length)
        caches = None
        with _progress("Embedding", len(encoded), show_progress_bar) as advance:
            if get_cache:
                embeddings, caches = self._encoder.embed_with_caches(
                    encoded, spec, tokens_per_device, advance
                )
            else:
                embeddings = self._encoder.embed(encoded, spec, tokens_per_device, advance)
        _check_finite(np.isfinite(embeddings).all(axis=1), "text")
        if recast:
            embeddings = embeddings.astype(self.model.config.dtype)
        if convert_to_tensor:
            replicated = NamedSharding(self.mesh, PartitionSpec())
            embeddings, caches = jax.device_put((embeddings, caches), replicated)
        elif recast:
            embeddings = embeddings.astype("float32")
        if is_one:
            embeddings = embeddings[0]
        return (embeddings, caches) if get_cache else embeddings

    def encode_queries(self, queries: TextLike | Sequence[TextLike], **options: Any) -> Any:
        """Returns `encode(queries, **options)`, under its name in the package `gritlm`."""
        return self.encode(queries, **options)

    def encode_corpus(self, corpus: Corpus, **options: Any) -> Any:
        """Returns the embeddings of documents with a ready-made instruction, as in `gritlm`.

        Args:
          corpus: texts, or dictionaries with "text" and optionally "title", which precedes it.
          **options: the other arguments of `encode`.
        """
        return self.encode(document_texts(corpus), **options)

    @accepts(GENERATE)
    def chat(
        self,
        messages: Chat | Sequence[Chat],
        max_new_tokens: int = 256,
        *,
        answer_prefix: str = "",
        **options: Any,
    ) -> Any:
        """Returns the assistant's answer to a chat, or to each of several chats.

        Chats have the format that the model was trained with: GRIT's, or the chat template of its
        tokenizer (`chat_template`).

        Args:
          messages: `[{"role": "user", "content": "Who are you?"}]`, or a list of such lists. Roles
            are "system", "user" and "assistant"; user and assistant alternate, and the user's
            message is the last. A system message precedes the user message that follows it.
          max_new_tokens: maximum tokens of an answer.
          answer_prefix: the words that every answer begins with; they are not returned.
          **options: the other arguments of `generate`, except `add_special_tokens`. With `cache`,
            the chat continues the cached text: it begins with a line break instead of `<s>`.

        Returns:
          A string for one chat, or a list of strings.

        Raises:
          InputError: the messages are not a chat, or see `generate`.
        """
        chats, is_one = as_chat_list(messages)
        first_index = options.get("first_index", 0)
        prompts = [
            self._encode_chat(chat, f"chat {index}", answer_prefix, options)
            for index, chat in enumerate(chats, first_index)
        ]
        results = self._generate(prompts, [True] * len(prompts), max_new_tokens, **options)
        texts = [result.text for result in results]
        return texts[0] if is_one else texts

    @accepts(GENERATE)
    def stream_chat(
        self,
        messages: Chat,
        max_new_tokens: int = 256,
        *,
        answer_prefix: str = "",
        **options: Any,
    ) -> Iterator[str]:
        """Returns an iterator over the text that `chat` returns for one chat.

        Args:
          messages: see `chat`.
          max_new_tokens: maximum tokens of the answer.
          answer_prefix: see `chat`.
          **options: see `stream`.

        Raises:
          InputError: see `chat`; raised by the call itself, before the first text.
        """
        chats, _ = as_chat_list(messages)
        if len(chats) != 1:
            raise InputError(f"stream_chat takes one chat, not {len(chats)}: call it for each")
        prompt = self._encode_chat(chats[0], "chat 0", answer_prefix, options)
        return self._stream(prompt, max_new_tokens, **options)

    @accepts(GENERATE)
    def generate(
        self,
        prompts: TextLike | Sequence[TextLike],
        max_new_tokens: int = 256,
        *,
        sampling: Sampling | None = None,
        do_sample: bool | None = None,
        temperature: float | int | None = None,
        top_k: int | None = None,
        top_p: float | int | None = None,
        min_p: float | int | None = None,
        repetition_penalty: float | int | None = None,
        stop: str | Sequence[str] | None = (),
        seed: int = 0,
        cache: KVCache | Sequence[KVCache] | None = None,
        add_special_tokens: bool = True,
        batch_size: int = 32,
        first_index: int = 0,
    ) -> Any:
        """Returns the continuation of each prompt, without the prompt.

        Args:
          prompts: strings with the model's markers, as
            "<|user|>\\nWho are you?\\n<|assistant|>\\n" (see
            `grit_jax.text.templates.chat_prompt`), or token ids, which are used as they are.
          max_new_tokens: maximum new tokens. Prompt and new tokens must fit the model's context.
          sampling: all sampling options in one object. By default they are the next six keywords;
            without any, decoding is greedy.
          do_sample: True sets the temperature to 1 if none is given, as in transformers.
          temperature: see `Sampling`, as for the next four.
          top_k: see `Sampling`.
          top_p: see `Sampling`.
          min_p: see `Sampling`.
          repetition_penalty: see `Sampling`.
          stop: strings at which text ends; they are not returned. Token ids end after the token
            that completes one.
          seed: seed for sampling, from 0 to 2**32 - 1. A result depends on the seed, the options,
            and the prompt and its index, not on the other prompts.
          cache: the KV cache of the text that precedes each prompt, as returned by
            `encode(..., get_cache=True)`. Prompts then begin without `<s>`.
          add_special_tokens: whether to begin strings with `<s>`, if the tokenizer does.
          batch_size: maximum number of prompts in a batch.
          first_index: index of the first prompt, if a list is continued in several calls.

        Returns:
          A string for a string, token ids for token ids, a list for a list. The end token is not
          returned.

        Raises:
          InputError: a prompt is empty, has the wrong type or is too long; the message names it.
          NotFiniteError: the logits are NaN.
          ValueError: a sampling option is out of range, or is given twice.
        """
        listed, is_one = as_text_list(prompts)
        add_bos = add_special_tokens and cache is None
        encoded = [
            self._prompt_encoder.encode(prompt, add_bos=add_bos, name=f"prompt {index}").tokens
            for index, prompt in enumerate(listed, first_index)
        ]
        are_strings = [isinstance(prompt, str) for prompt in listed]
        results = self._generate(
            encoded,
            are_strings,
            max_new_tokens,
            sampling=sampling,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            seed=seed,
            cache=cache,
            batch_size=batch_size,
            first_index=first_index,
        )
        continuations = [
            result.text if is_string else result.ids
            for result, is_string in zip(results, are_strings, strict=True)
        ]
        return continuations[0] if is_one else continuations

    @accepts(GENERATE)
    def stream(
        self,
        prompt: TextLike,
        max_new_tokens: int = 256,
        *,
        add_special_tokens: bool = True,
        **options: Any,
    ) -> Iterator[str]:
        """Returns an iterator over the text that `generate` returns for one prompt.

        A piece of text ends with a complete character. Text that may be the beginning of a stop
        string is held back.

        Args:
          prompt: see `generate`.
          max_new_tokens: maximum new tokens.
          add_special_tokens: whether to begin a string with `<s>`, if the tokenizer does.
          **options: `sampling` or its keywords, `stop`, `seed` and `cache`, as in `generate`.

        Raises:
          InputError: see `generate`; raised by the call itself, before the first text.
        """
        listed, _ = as_text_list(prompt)
        if len(listed) != 1:
            raise InputError(f"stream takes one prompt, not {len(listed)}: call it for each")
        add_bos = add_special_tokens and options.get("cache") is None
        encoded = self._prompt_encoder.encode(listed[0], add_bos=add_bos, name="prompt 0").tokens
        return self._stream(encoded, max_new_tokens, **options)

    def score(
        self,
        prompts: Sequence[TextLike],
        continuations: Sequence[TextLike],
        *,
        add_special_tokens: bool = True,
        batch_size: int = 256,
    ) -> tuple[Float64[np.ndarray, " pairs"], Bool[np.ndarray, " pairs"]]:
        """Returns how likely each continuation is after its prompt, with causal attention.

        Pairs are packed into rows. Pairs with the same prompt whose continuations differ only in
        their last token share one input.

        Args:
          prompts: strings or token ids; the same prompt may occur several times.
          continuations: one for each prompt, of the same type. Strings are tokenized together with
            their prompt, and a token with characters of both is scored: in "The ab" and "stract",
            or "is " and "Paris", the characters of the prompt in that token are scored with it.
          add_special_tokens: whether to begin prompts that are strings with `<s>`, if the
            tokenizer does.
          batch_size: bounds memory, as `batch_size` texts of 512 tokens do in `encode`.

        Returns:
          The log-likelihoods in nats, summed over the continuation's tokens; and whether greedy
          `generate` would begin with the continuation.

        Raises:
          InputError: there are no texts, or a text is empty, has the wrong type or is too long; the
            message names it.
          NotFiniteError: a log-likelihood is NaN or infinite.
        """
        self.model.check_has_head()
        pairs = as_continuations(
            self._prompt_encoder,
            prompts,
            continuations,
            self.model.config.max_position_embeddings,
            add_bos=add_special_tokens,
        )
        check_count("batch_size", batch_size)
        tokens_per_device = self._tokens_per_device(batch_size, SCORE_LENGTH)
        with _progress("Scoring", len(pairs)) as advance:
            log_likelihoods, are_greedy = self._scorer.score(pairs, tokens_per_device, advance)
        _check_finite(np.isfinite(log_likelihoods), "continuation")
        return log_likelihoods, are_greedy

    def warm_up(
        self,
        batch_size: int = 1,
        max_length: int = 512,
        max_new_tokens: int = 256,
        *,
        sampling: Sampling | None = None,
    ) -> None:
        """Compiles the programs of later calls, which then do not wait for the compiler.

        Args:
          batch_size: the largest number of texts that a later call embeds, and the number of
            prompts that it continues.
          max_length: maximum tokens of these texts and prompts.
          max_new_tokens: that of later calls of `generate` and `chat`; 0 compiles only `encode`.
          sampling: options of these calls. Other values need no other program, except `top_k` and
            options that are not set here.

        Raises:
          InputError: an argument is not in range.
        """
        check_count("batch_size", batch_size)
        check_count("max_length", max_length)
        check_count("max_new_tokens", max_new_tokens, 0)
        context_length = self.model.config.max_position_embeddings
        length = min(max_length, context_length)
        tokens_per_device = self._tokens_per_device(256, length)
        self._encoder.compile(batch_size, length, self.embedding_spec, tokens_per_device)
        if max_new_tokens:
            longest = max(1, min(max_length, context_length - max_new_tokens))
            for length in prompt_widths(longest):
                prompts = [np.zeros(min(length, longest), np.int32)] * batch_size
                request = self._request(prompts, max_new_tokens, sampling=sampling)
                self._generator.compile(request)

    def unnormalized(self) -> GritLM:
        """Returns this model with embeddings that are not scaled to length 1.

        Parameters and compiled programs are shared.
        """
        other = copy.copy(self)
        other.embedding_spec = dataclasses.replace(self.embedding_spec, normalize=False)
        return other

    def _prompt(self, instruction: str | None, stored: str) -> str:
        """Returns the prompt of an instruction in plain words, or the stored one for None."""
        if instruction is None:
            return stored
        return prompt_of_instruction(instruction, self.embedding_spec)

    def _encode_chat(
        self, messages: Any, name: str, answer_prefix: str, options: Mapping[str, Any]
    ) -> Int[np.ndarray, " tokens"]:
        is_continuation = options.get("cache") is not None
        return self._prompt_encoder.encode_chat(
            messages, is_continuation=is_continuation, name=name, answer_prefix=answer_prefix
        )

    def _generate(
        self,
        prompts: Sequence[Int[np.ndarray, " _"]],
        are_strings: Sequence[bool],
        max_new_tokens: int,
        *,
        stop: str | Sequence[str] | None = (),
        batch_size: int = 32,
        **options: Any,
    ) -> list[GenerationResult]:
        check_count("batch_size", batch_size)
        stop = as_stop_strings(stop)
        request = self._request(prompts, max_new_tokens, **options)
        results = [self._result(is_string, stop) for is_string in are_strings]
        for members in batches_by_length(prompts, batch_size):
            batch = request.select(members, min(batch_size, bucket_size(len(prompts))))
            generate_results(self._generator, batch, [results[member] for member in members])
        return results

    def _stream(
        self,
        prompt: Int[np.ndarray, " tokens"],
        max_new_tokens: int,
        *,
        stop: str | Sequence[str] | None = (),
        **options: Any,
    ) -> Iterator[str]:
        result = self._result(True, as_stop_strings(stop))
        request = self._request([prompt], max_new_tokens, **options)
        return stream_text(self._generator, request, result, STREAM_STEPS)

    def _request(
        self,
        prompts: Sequence[Int[np.ndarray, " _"]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        cache: KVCache | Sequence[KVCache] | None = None,
        first_index: int = 0,
        **sampling_options: Any,
    ) -> Request:
        self.model.check_has_head()
        check_count("seed", seed, 0, LARGEST_SEED)
        check_count("first_index", first_index, 0)
        request = Request(
            prompts=prompts,
            indices=range(first_index, first_index + len(prompts)),
            max_new_tokens=max_new_tokens,
            end_tokens=self._end_tokens,
            sampling=as_sampling(sampling, **sampling_options),
            seed=seed,
            caches=[cache] if isinstance(cache, KVCache) else cache,
            num_rows=len(prompts),
        )
        check_fits_context(request, self.model.config.max_position_embeddings)
        return request

    def _result(self, is_string: bool, stop: Sequence[str]) -> GenerationResult:
        needs_text = is_string or stop
        return GenerationResult(self._end_tokens, self.tokenizer if needs_text else None, stop)

    def _tokens_per_device(self, batch_size: int, length: int) -> int:
        """Returns the maximum tokens of a call on one device, for a batch size and text length."""
        return min(TOKENS_PER_DEVICE, ceil_div(batch_size * length, batch_shards(self.mesh)))

    @functools.cached_property
    def _end_tokens(self) -> tuple[int, ...]:
        """The tokens that end generated text, and those that end a turn in the chat template."""
        end_tokens = self._given_end_tokens
        with contextlib.suppress(InputError, TokenizerError):  # `chat` raises it.
            if (template := self._prompt_encoder.chat_template) is not None:
                end_tokens = tuple(dict.fromkeys((*end_tokens, *template.end_ids)))
        return end_tokens

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self.model, self.mesh)

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.model, self.mesh)

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.model, self.mesh)


def _dtype_name(dtype: Any) -> str:
    """Returns the name of a type of JAX, NumPy or PyTorch.

    Raises:
      ValueError: the model cannot have this type.
    """
    name = str(dtype).removeprefix("torch.")
    with contextlib.suppress(TypeError):
        name = jnp.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be {' or '.join(map(repr, DTYPES))}")
    return name


def _check_finite(are_finite: Bool[np.ndarray, " texts"], kind: str) -> None:
    if not are_finite.all():
        raise NotFiniteError(f"{kind} {int(np.argmin(are_finite))}")


@contextlib.contextmanager
def _progress(
    title: str, num_texts: int, is_shown: bool | None = None
) -> Iterator[Callable[[int], None]]:
    """Yields a function that advances a progress bar; None shows it if there are many texts."""
    is_shown = num_texts >= PROGRESS_MIN_TEXTS if is_shown is None else is_shown
    is_hidden = not is_shown or not is_primary()
    with Progress(console=Console(stderr=True), disable=is_hidden) as progress:
        task = progress.add_task(title, total=num_texts)
        yield functools.partial(progress.advance, task)
