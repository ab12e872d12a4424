"""`GritLM` as an encoder of MTEB (the package mteb, 2.x; arXiv 2210.07316).

Instructions follow the original: in retrieval tasks only queries get the task's instruction, in all
other tasks both sides get it. Embeddings are not normalized, because their lengths matter to the
classifiers that are trained on them; all other tasks compare by cosine similarity.
"""

from collections.abc import Mapping, Sequence
import logging
from pathlib import Path
from typing import Any

from jaxtyping import Float32
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
import numpy as np

from grit_jax.evaluation.paper import INSTRUCTIONS
from grit_jax.evaluation.results import model_settings
from grit_jax.files import json_sha256
from grit_jax.inference.gritlm import GritLM
from grit_jax.inference.prompt_encoder import InputError

# Types of tasks whose documents get no instruction.
RETRIEVAL_TYPES = ("Retrieval", "InstructionRetrieval", "InstructionReranking")
# Replaces an empty text, which has no tokens.
EMPTY_TEXT = "."


class MtebModel(AbsEncoder):
    """A model for `mteb.evaluate`.

    Args:
      model: embeds the texts.
      name: name of the model in MTEB's folders of results.
      revision: identifies the weights; MTEB does not mix the results of different revisions.
      max_length: maximum tokens of a text; longer texts are truncated.
      instructions: instructions by name or type of task, which override those of the paper.

    Attributes:
      settings: everything except the weights that scores depend on; MTEB does not mix the results
        of different settings.
    """

    def __init__(
        self,
        model: GritLM,
        name: str | Path,
        revision: str,
        *,
        max_length: int = 512,
        instructions: Mapping[str, str] | None = None,
    ):
        self.model = model.unnormalized()
        own = dict(instructions or {})
        self.prompts_dict = INSTRUCTIONS | own
        self._max_length = max_length
        self.settings: dict[str, Any] = model_settings(model) | {
            "attention": model.embedding_spec.attention,
            "pooling": model.embedding_spec.pooling,
            "max_length": max_length,
            "instructions": json_sha256(own)[:16] if own else "",
        }
        self.mteb_model_meta = _describe(model, Path(name).name, revision, self.settings)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **options: Any,
    ) -> Float32[np.ndarray, "texts size"]:
        """Returns the embeddings of texts.

        Args:
          inputs: batches with the key "text". Texts that are empty or None are embedded as
            `EMPTY_TEXT`, with a warning.
          task_metadata: metadata of the task, for its instruction.
          hf_split: not used.
          hf_subset: not used.
          prompt_type: whether the texts are queries or documents; None if the task has one side.
          **options: `batch_size`, see `GritLM.encode`; others are not used.

        Raises:
          InputError: a batch has no texts, but images, for example; or see `GritLM.encode`.
        """
        texts = [text for batch in inputs for text in _texts(batch, task_metadata.name)]
        if not texts:
            return np.zeros((0, _embedding_size(self.model)), np.float32)
        empty = [index for index, text in enumerate(texts) if text is None or not text.strip()]
        if empty:
            logging.warning(
                "%s: %d texts are empty and embedded as %r",
                task_metadata.name,
                len(empty),
                EMPTY_TEXT,
            )
        for index in empty:
            texts[index] = EMPTY_TEXT
        return self.model.encode_query(
            texts,
            self.instruction(task_metadata, prompt_type),
            batch_size=options.get("batch_size", 256),
            max_length=self._max_length,
            truncate=True,
        )

    def instruction(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """Returns the instruction for one side of a task, "" for documents of retrieval tasks."""
        if prompt_type == PromptType.document and task_metadata.type in RETRIEVAL_TYPES:
            return ""
        return self.get_instruction(task_metadata, PromptType.query)


def _texts(batch: Mapping[str, Any], task: str) -> Sequence[Any]:
    """Returns the texts of a batch."""
    texts = batch.get("text")
    if texts is None:
        raise InputError(
            f"{task} has no texts, but {', '.join(batch) or 'nothing'}, and this model embeds only "
            "texts: leave the task out"
        )
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise InputError(f"{task} has a text of type {type(text).__name__}: correct its data")
    return texts


def _embedding_size(model: GritLM) -> int:
    config = model.model.config
    return config.embedding_projection_size or config.hidden_size


def _describe(model: GritLM, name: str, revision: str, settings: Mapping[str, Any]) -> ModelMeta:
    return ModelMeta(
        loader=None,
        name=f"grit-jax/{name}",
        revision=revision,
        release_date=None,
        languages=None,
        n_parameters=None,
        memory_usage_mb=None,
        max_tokens=settings["max_length"],
        embed_dim=_embedding_size(model),
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=[],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=True,
        training_datasets=None,
        experiment_kwargs=settings,
    )
