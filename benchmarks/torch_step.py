"""The joint step of GRIT with transformers and torch, as in the original implementation.

Queries, passages and chats are padded to the longest of each, and processed one after the other.
The loss is InfoNCE over all passages plus the cross-entropy of the chats. It omits GradCache.
"""

import time
from typing import Any

import numpy as np
from step_work import GROUP_SIZE, TEMPERATURE, Setting, StepTexts, Texts
import torch
from torch.nn import functional
from transformers import MistralConfig, MistralForCausalLM

IGNORED = -100


class TorchSide:
    """Takes steps with torch, on a GPU if there is one."""

    def __init__(self, setting: Setting, cases: dict[str, list[StepTexts]]):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._cases = cases
        config = MistralConfig(
            **setting.sizes,
            rms_norm_eps=1e-5,
            sliding_window=None,
            attn_implementation="sdpa",
            use_cache=False,
        )
        torch.manual_seed(0)
        with torch.device(self.device):
            model = MistralForCausalLM._from_config(config, dtype=getattr(torch, setting.dtype))
        self.model = model.train()
        if setting.remat == "full":
            self.model.activation_checkpointing_enable()
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=setting.learning_rate, weight_decay=0.0, fused=True
        )

    def step(self, case: str, number: int) -> dict[str, float]:
        """Takes a step on a case's texts of this index; returns its seconds and losses."""
        texts = self._cases[case][number]
        streams = {name: self._pad(stream) for name, stream in texts.items()}
        # The rows have no unused indices, so the positives have other indices in them.
        rows = {passage: row for row, passage in enumerate(texts["passage"].by_index)}
        own = [rows[query * GROUP_SIZE] for query in texts["query"].by_index]
        positives = torch.tensor(own, device=self.device)
        self._wait()
        start = time.perf_counter()
        losses = self._step(streams, positives)
        self._wait()
        return {"seconds": time.perf_counter() - start, **losses}

    def peak_memory(self) -> float | None:
        """Returns the peak memory of the GPU in bytes, or None without one."""
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None

    def _step(
        self, streams: dict[str, tuple[torch.Tensor, ...]], positives: torch.Tensor
    ) -> dict[str, float]:
        queries, passages = self._embed(*streams["query"]), self._embed(*streams["passage"])
        scores = queries @ passages.T / TEMPERATURE
        embedding_loss = functional.cross_entropy(scores, positives)
        generative_loss = self._generative_loss(*streams["chat"])
        (embedding_loss + generative_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return {
            "embedding_loss": embedding_loss.item(),
            "generative_loss": generative_loss.item(),
        }

    def _embed(
        self, tokens: torch.Tensor, is_token: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """Returns the normalized mean of the masked tokens, with bidirectional attention."""
        # transformers builds the mask from the configuration, and sdpa uses the keyword.
        self.model.config.is_causal = False
        output: Any = self.model.model(tokens, attention_mask=is_token, is_causal=False)
        weights = counts.float()[..., None]
        mean = (output.last_hidden_state.float() * weights).sum(1) / weights.sum(1)
        return functional.normalize(mean, dim=-1)

    def _generative_loss(
        self, tokens: torch.Tensor, is_token: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """Returns the mean cross-entropy of the masked tokens, with causal attention."""
        self.model.config.is_causal = True
        labels = tokens.masked_fill(~counts, IGNORED)
        return self.model(tokens, attention_mask=is_token, labels=labels).loss

    def _pad(self, texts: Texts) -> tuple[torch.Tensor, ...]:
        """Returns tokens, which of them are not padding, and the mask; one text per row."""
        shape = (len(texts.by_index), max(texts.lengths))
        tokens, is_token = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        counts = np.zeros(shape, bool)
        for row, text in enumerate(texts.by_index.values()):
            span = (row, slice(len(text)))
            tokens[span], is_token[span], counts[span] = text.tokens, 1, text.mask
        return tuple(torch.from_numpy(each).to(self.device) for each in (tokens, is_token, counts))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
