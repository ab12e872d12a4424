"""The joint GRIT step in transformers and torch, as in the original.

Queries, passages and chats are padded to the longest text of each and computed one after the other;
the loss is InfoNCE over all passages plus the cross-entropy of the chats. Without GradCache.
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
    """Runs steps with torch, on a GPU if available."""

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
        """Runs a step on the given texts; returns its seconds and losses."""
        texts = self._cases[case][number]
        streams = {name: self._pad(stream) for name, stream in texts.items()}
        # Index of each positive among the used passages.
        places = {passage: place for place, passage in enumerate(texts["passage"].by_number)}
        own = [places[query * GROUP_SIZE] for query in texts["query"].by_number]
        positives = torch.tensor(own, device=self.device)
        self._wait()
        start = time.perf_counter()
        losses = self._step(streams, positives)
        self._wait()
        return {"seconds": time.perf_counter() - start, **losses}

    def peak_memory(self) -> float | None:
        """Returns the GPU's peak memory in bytes, or None without a GPU."""
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
        """Returns the normalized mean over unmasked tokens, with bidirectional attention."""
        # With a mask, the config decides; without one, the keyword.
        self.model.config.is_causal = False
        read: Any = self.model.model(tokens, attention_mask=is_token, is_causal=False)
        weights = counts.float()[..., None]
        mean = (read.last_hidden_state.float() * weights).sum(1) / weights.sum(1)
        return functional.normalize(mean, dim=-1)

    def _generative_loss(
        self, tokens: torch.Tensor, is_token: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """Returns the mean cross-entropy of the target tokens, with causal attention."""
        self.model.config.is_causal = True
        labels = tokens.masked_fill(~counts, IGNORED)
        return self.model(tokens, attention_mask=is_token, labels=labels).loss

    def _pad(self, texts: Texts) -> tuple[torch.Tensor, ...]:
        """Returns padded tokens, padding mask and pooling or target mask, one text per row."""
        shape = (len(texts.by_number), max(texts.lengths))
        tokens, is_token = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        counts = np.zeros(shape, bool)
        for row, text in enumerate(texts.by_number.values()):
            place = (row, slice(len(text)))
            tokens[place], is_token[place], counts[place] = text.tokens, 1, text.mask
        return tuple(torch.from_numpy(each).to(self.device) for each in (tokens, is_token, counts))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
