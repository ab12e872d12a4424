"""`GritLM` as an encoder of MTEB (the package mteb, 2.x; arXiv 2210.07316).

Instructions are given as the original gives them: a task's own goes before queries alone where
queries look for documents, and before both sides where they are of one kind. Embeddings keep their
lengths, which matter to the classifiers that are trained on them; all else compares by cosine.
"""

from collections.abc import Mapping
import hashlib
import json
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
from grit_jax.inference.gritlm import GritLM
from grit_jax.text.templates import embedding_prefix

# The kinds of tasks whose documents have no instruction.
ASKED_BY_QUERIES = ("Retrieval", "InstructionRetrieval", "InstructionReranking")
# Stands for a text without anything in it, which no tokenizer makes a token of.
NOTHING = "."


class MtebModel(AbsEncoder):
    """What `mteb.evaluate` takes.

    Args:
      model: embeds the texts.
      name: of the model, in MTEB's folders of results.
      revision: what tells its weights from others of this name; results of another are no results
        of this one.
      max_length: tokens of a text; longer ones are cut.
      instructions: by the name of a task or a kind of tasks, in the place of MTEB's own.

    Attributes:
      settings: what scores depend on beside the weights; MTEB keeps those of others apart.
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
            "attention": model.attention,
            "pooling": model.pooling,
            "max_length": max_length,
            "instructions": _digest(own) if own else "",
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
        """Returns the embeddings of the texts of `inputs`, batches with the key "text".

        Args:
          inputs: batches of texts.
          task_metadata: of the task, for its instruction.
          hf_split: not used.
          hf_subset: not used.
          prompt_type: which side of the task the texts are; None where it has one.
          **options: `batch_size`, see `GritLM.encode`; others are not used.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        empty = [number for number, text in enumerate(texts) if not text.strip()]
        if empty:
            logging.warning(
                "%s: %d texts are empty and read as %r", task_metadata.name, len(empty), NOTHING
            )
        for number in empty:
            texts[number] = NOTHING
        return self.model.encode(
            texts,
            batch_size=options.get("batch_size", 256),
            max_length=self._max_length,
            instruction=embedding_prefix(self.instruction(task_metadata, prompt_type)),
            truncate=True,
        )

    def instruction(self, task_metadata: Any, prompt_type: PromptType | None) -> str:
        """Returns what the texts of one side of a task are embedded for; "" for plain documents."""
        if prompt_type == PromptType.document and task_metadata.type in ASKED_BY_QUERIES:
            return ""
        return self.get_instruction(task_metadata, PromptType.query)


def _digest(instructions: Mapping[str, str]) -> str:
    content = json.dumps(instructions, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _describe(model: GritLM, name: str, revision: str, settings: Mapping[str, Any]) -> ModelMeta:
    config = model.model.config
    return ModelMeta(
        loader=None,
        name=f"grit-jax/{name}",
        revision=revision,
        release_date=None,
        languages=None,
        n_parameters=None,
        memory_usage_mb=None,
        max_tokens=settings["max_length"],
        embed_dim=config.embedding_projection_size or config.hidden_size,
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
