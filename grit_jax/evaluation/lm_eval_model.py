"""`GritLM` as a model of lm-eval, EleutherAI's evaluation harness (the package lm_eval).

Texts are tokenized as lm-eval's own model for `transformers` tokenizes them for an exported model:
each text begins with `<s>` if the tokenizer does so, and strings such as `</s>` in a text become
tokens. No text ends with `</s>`.
"""

from collections import defaultdict
from collections.abc import Sequence
import json
import logging
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
import numpy as np

from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.prompt_encoder import (
    InputError,
    as_stop_strings,
    check_count,
    check_unicode,
)
from grit_jax.inference.sampling import SAMPLING_FILTERS, Sampling, as_sampling
from grit_jax.text.templates import ChatError, chat_segments

# Options that a task can set for generation. The filters apply only with `do_sample`.
FILTERS = ("temperature", *SAMPLING_FILTERS)
SAMPLING_OPTIONS = (*FILTERS, "repetition_penalty")


class LmEvalModel(TemplateLM):
    """A model for `lm_eval.simple_evaluate`.

    Args:
      model: scores and continues texts.
      batch_size: maximum number of prompts in a batch.
      max_new_tokens: maximum tokens of an answer, if a task does not set it.
    """

    def __init__(self, model: GritLM, *, batch_size: int = 32, max_new_tokens: int = 256):
        super().__init__()
        model.model.check_has_head()
        self._model = model
        self._end_of_text = model.tokenizer.special_tokens["eos_token"]
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        self.max_length = model.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, `</s>`."""
        return self._model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that precedes a text without context: `<s>`, or `</s>` if there is no `<s>`."""
        bos = self._model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """A name that differs between tokenizers; lm-eval caches requests by it."""
        return self._model.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns the token ids of a text.

        It begins with `<s>` if the tokenizer does so, unless that is switched off or the string
        begins with it.
        """
        tokenizer = self._model.tokenizer
        ids = tokenizer.encode_markup(string)
        if add_special_tokens is False:
            return ids
        if add_special_tokens is None and ids[:1] == [self.prefix_token_id]:
            return ids
        return [*tokenizer.begin_ids.tolist(), *ids]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a chat as text, in the chat template of the model or, without `<s>`, in GRIT's.

        Args:
          chat_history: messages of "system", "user" and "assistant"; the last may be the
            assistant's.
          add_generation_prompt: whether to end with the assistant's marker. If not, the text ends
            without `</s>`, to be continued.

        Raises:
          InputError: the messages are not a chat; the chat template of an exported model refuses
            them, too.
        """
        try:
            segments = chat_segments(chat_history, add_generation_prompt=add_generation_prompt)
            if self._model.chat_template is not None:
                return self._model.chat_template.text(
                    chat_history,
                    is_open=add_generation_prompt or chat_history[-1]["role"] == "assistant",
                )
        except ChatError as error:
            roles = ", ".join(str(message.get("role")) for message in chat_history)
            raise InputError(
                f"a task's chat has the roles {roles}: {error}; correct the task, or leave out "
                "--apply-chat-template"
            ) from None
        text = self._end_of_text.join(segments)
        return text if add_generation_prompt else text.removesuffix(self._end_of_text)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether it is greedy.

        Raises:
          InputError: a continuation is empty or longer than the context; the message names the
            document.
        """
        _check_unicode(requests)
        for request in requests:
            _, continuation = cast(tuple[str, str], request.args)
            if not continuation:
                raise InputError(
                    f"{_document(request)}: the continuation is empty: correct the task"
                )
        try:
            return super().loglikelihood(requests, disable_tqdm)
        except _ContinuationError as error:
            raise InputError(f"{_document(requests[error.index])}: {error}") from None

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        """Returns the log-likelihood of each continuation, and whether it is greedy."""
        prompts, continuations, num_truncated = [], [], 0
        for index, (_, context, continuation) in enumerate(requests):
            # The last token is not an input of the model.
            max_context = self.max_length + 1 - len(continuation)
            if max_context < 1 or not len(continuation):
                raise _ContinuationError(index, len(continuation), self.max_length)
            num_truncated += len(context) > max_context
            prompts.append(np.array(context[-max_context:]))
            continuations.append(np.array(continuation))
        _warn_of_truncation(num_truncated, len(requests))
        if not requests:
            return []
        values, are_greedy = self._model.score(prompts, continuations)
        answers = [(float(v), bool(g)) for v, g in zip(values, are_greedy, strict=True)]
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text; each token is predicted once."""
        _check_unicode(requests)
        windows, owners = [], []
        for index, request in enumerate(requests):
            for context, continuation in map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                ),
            ):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [value for value, _ in self._loglikelihood_tokens(windows)])
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, float(total))
        return totals.tolist()

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Returns the answer to each prompt, up to the stop strings of its task.

        Raises:
          InputError: an option of the task is not supported; the message names the task.
        """
        _check_unicode(requests)
        by_options = defaultdict(list)
        for index, request in enumerate(requests):
            by_options[json.dumps(request.args[1], sort_keys=True)].append(index)
        answers = [""] * len(requests)
        for indices in by_options.values():
            options = requests[indices[0]].args[1]
            prompts = [requests[index].args[0] for index in indices]
            try:
                generated = self._generate(prompts, options)
            except InputError as error:
                raise InputError(f"{requests[indices[0]].task_name}: {error}") from None
            for index, answer in zip(indices, generated, strict=True):
                answers[index] = answer
                self.cache_hook.add_partial("generate_until", requests[index].args, answer)
        return answers

    def _generate(self, prompts: Sequence[str], options: dict[str, Any]) -> list[str]:
        remaining: dict[str, Any] = {**normalize_gen_kwargs(options, self._max_new_tokens)}
        stop = as_stop_strings(remaining.pop("until", []))
        max_new_tokens = int(remaining.pop("max_gen_toks"))
        check_count("max_gen_toks", max_new_tokens)
        sampling = _sampling(remaining)
        if remaining:
            raise InputError(
                f"a task sets {', '.join(remaining)} in its generation_kwargs; supported are "
                f"{', '.join((*SAMPLING_OPTIONS, 'do_sample', 'until', 'max_gen_toks'))}"
            )
        max_prompt = self.max_length - max_new_tokens
        if max_prompt < 1:
            raise InputError(
                f"a task generates {max_new_tokens} new tokens, but the model's context is "
                f"{self.max_length}: set a smaller max_gen_toks in its generation_kwargs"
            )
        ids = [self.tok_encode(prompt) for prompt in prompts]
        _warn_of_truncation(sum(len(prompt) > max_prompt for prompt in ids), len(ids))
        generated = self._model.generate(
            [np.array(prompt[-max_prompt:]) for prompt in ids],
            max_new_tokens,
            sampling=sampling,
            stop=stop,
            batch_size=self._batch_size,
        )
        decode = self._model.tokenizer.decode
        return [_before(stop, decode(tokens.tolist())) for tokens in generated]


class _ContinuationError(InputError):
    """A continuation has no tokens, or more than the context."""

    def __init__(self, index: int, num_tokens: int, context_length: int):
        super().__init__(
            f"the continuation has {num_tokens} tokens, and must have 1 to {context_length}, the "
            "model's context: leave the task out"
        )
        self.index = index


def _document(request: Instance) -> str:
    return f"document {request.doc_id} of {request.task_name}"


def _check_unicode(requests: Sequence[Instance]) -> None:
    for request in requests:
        for text in request.args:
            if isinstance(text, str):
                check_unicode(text, _document(request))


def _sampling(options: dict[str, Any]) -> Sampling:
    """Removes the sampling options of lm-eval from `options`, and returns them."""
    do_sample = options.pop("do_sample")
    given = {name: options.pop(name, None) for name in SAMPLING_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    # A temperature of 0 is greedy decoding, as in vLLM.
    if not do_sample or given.get("temperature") == 0:
        do_sample = False  # lm-eval's own model ignores the filters, too.
        given = {name: given[name] for name in given if name not in FILTERS}
    if given.get("top_k", 1) < 1:  # lm-eval's value for no filter.
        del given["top_k"]
    if options.get("num_beams") == 1:  # lm-eval's value for no beam search.
        del options["num_beams"]
    return as_sampling(None, do_sample=do_sample, **given)


def _before(stop: Sequence[str], text: str) -> str:
    """Returns the text before the first stop string."""
    return text[: min([text.find(string) for string in stop if string in text], default=len(text))]


def _warn_of_truncation(num_truncated: int, total: int) -> None:
    if num_truncated:
        logging.warning(
            "%d of %d texts are longer than the model's context: their beginnings are truncated",
            num_truncated,
            total,
        )
