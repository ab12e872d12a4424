"""`GritLM` as a model of lm-eval, EleutherAI's harness (the package lm_eval).

Texts become tokens as the harness' own model for `transformers` makes them of an exported model:
what begins a text goes before each, and what ends one (`</s>`), written within, is that token.
"""

from collections import defaultdict
from collections.abc import Sequence
import json
import logging
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
import numpy as np

from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.prompt_encoder import InputError
from grit_jax.text.templates import ASSISTANT, chat_prompt

# What a task may ask of generation, beside where it ends; the first of them, of what is drawn.
DRAWING = ("temperature", "top_k", "top_p", "min_p")
SAMPLING = (*DRAWING, "repetition_penalty")


class LmEvalModel(TemplateLM):
    """What `lm_eval.simple_evaluate` takes.

    Args:
      model: scores and continues texts.
      batch_size: prompts that are continued together.
      max_new_tokens: of answers to tasks that do not say it.
    """

    def __init__(self, model: GritLM, *, batch_size: int = 32, max_new_tokens: int = 256):
        super().__init__()
        self._model = model
        self._end_of_text = model.tokenizer.special_tokens["eos_token"]
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        self.max_length = model.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text."""
        return self._model.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """What tells requests made with this tokenizer from others."""
        return self._model.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Returns the token ids of a text, with `<s>` before them unless that is not wanted."""
        ids = [] if add_special_tokens is False else [self.prefix_token_id]
        for number, part in enumerate(string.split(self._end_of_text)):
            if number:
                ids.append(self.eot_token_id)
            ids += self._model.tokenizer.ids(part).tolist()
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a chat in GRIT's format, with the marker after which the assistant speaks.

        Args:
          chat_history: turns of "user" and "assistant", of which the last may be either. A system's
            text goes before the user's that follows it.
          add_generation_prompt: False if the last turn, the assistant's, is to be continued.
        """
        text, system = "", ""
        for turn in chat_history:
            content = turn["content"]
            if turn["role"] == "system":
                system += f"{content}\n\n"
            elif turn["role"] == "user":
                prompt = chat_prompt(system + content, is_first=not text)
                text, system = text + prompt.removesuffix(ASSISTANT), ""
            else:
                text += f"{ASSISTANT}{content.strip()}{self._end_of_text}"
        return text + ASSISTANT if add_generation_prompt else text.removesuffix(self._end_of_text)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        """Returns log-likelihoods, and whether they are greedy, of contexts and continuations."""
        prompts, continuations, num_cut = [], [], 0
        for _, context, continuation in requests:
            # The last token is not read.
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise InputError(
                    f"a continuation of {len(continuation)} tokens does not fit the model's "
                    f"context of {self.max_length}"
                )
            num_cut += len(context) > room
            prompts.append(np.array(context[-room:]))
            continuations.append(np.array(continuation))
        _warn_of_cuts(num_cut, len(requests))
        if not requests:
            return []
        values, are_greedy = self._model.score(prompts, continuations)
        answers = [(float(v), bool(g)) for v, g in zip(values, are_greedy, strict=True)]
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text, of which each token is predicted once."""
        windows, owners = [], []
        for number, request in enumerate(requests):
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
                owners.append(number)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [value for value, _ in self._loglikelihood_tokens(windows)])
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, float(total))
        return totals.tolist()

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Returns the answer to each prompt, which ends before the strings that its task names."""
        alike = defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(number)
        answers = [""] * len(requests)
        for numbers in alike.values():
            options = requests[numbers[0]].args[1]
            found = self._generate([requests[number].args[0] for number in numbers], options)
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer
                self.cache_hook.add_partial("generate_until", requests[number].args, answer)
        return answers

    def _generate(self, prompts: Sequence[str], options: dict[str, Any]) -> list[str]:
        asked: dict[str, Any] = {**normalize_gen_kwargs(options, self._max_new_tokens)}
        stop = [string for string in asked.pop("until", []) if string]
        max_new_tokens = int(asked.pop("max_gen_toks"))
        is_drawn = asked.pop("do_sample")
        sampling = {name: asked.pop(name) for name in SAMPLING if name in asked}
        if not is_drawn:  # The harness' own model passes over them, too.
            sampling = {name: sampling[name] for name in sampling if name not in DRAWING}
        if sampling.get("top_k", 1) < 1:  # The harness' way to say: of all.
            del sampling["top_k"]
        if asked.get("num_beams") == 1:  # The harness' way to say: no search.
            del asked["num_beams"]
        if asked:
            raise InputError(
                f"a task asks for {', '.join(asked)} in its generation_kwargs; there are "
                f"{', '.join((*SAMPLING, 'do_sample', 'until', 'max_gen_toks'))}"
            )
        sampling["temperature"] = (sampling.get("temperature") or 1.0) if is_drawn else 0.0
        room = self.max_length - max_new_tokens
        if room < 1:
            raise InputError(
                f"a task asks for {max_new_tokens} new tokens, but the model's context is "
                f"{self.max_length}: say max_gen_toks in its generation_kwargs"
            )
        ids = [self.tok_encode(prompt) for prompt in prompts]
        _warn_of_cuts(sum(len(prompt) > room for prompt in ids), len(ids))
        made = self._model.generate(
            [np.array(prompt[-room:]) for prompt in ids],
            max_new_tokens,
            stop=stop,
            batch_size=self._batch_size,
            **sampling,
        )
        return [_before(stop, self._model.tokenizer.decode(tokens.tolist())) for tokens in made]


def _before(stop: Sequence[str], text: str) -> str:
    """Returns what of a text is before the first of some strings."""
    return text[: min([text.find(string) for string in stop if string in text], default=len(text))]


def _warn_of_cuts(number: int, of: int) -> None:
    if number:
        logging.warning(
            "%d of %d texts are longer than the model's context: their beginnings are cut off",
            number,
            of,
        )
