"""grit-jax: one decoder language model that embeds and generates, trained with JAX.

These modules and names are public:

    grit_jax                                GritLM, Sampling, EmbeddingSpec, InputError
    grit_jax.rag                            documents.read_documents, index.build_index,
                                            index.IndexUpdate, index.delete_documents,
                                            index.DocumentIndex, index_folder.DocumentIndexError,
                                            pipeline.RagPipeline, pipeline.RagPrompt,
                                            pipeline.RagAnswer, pipeline.Source
    grit_jax.text.templates                 the text formats: prompts and chats
    grit_jax.sharding                       make_mesh, MeshError
    grit_jax.conversion                     open_model, ConversionError,
                                            export.write_hugging_face, orbax_model.write_orbax
    grit_jax.prepare.prepare                prepare_mixtures
    grit_jax.prepare.datasets               add_dataset, add_mixture, by_size
    grit_jax.prepare.seqio_tasks            the same for seqio Tasks and Mixtures
    grit_jax.config                         default_config, parse_config, Config,
                                            ConfigError
    grit_jax.run                            run
    grit_jax.evaluation                     mteb_model.MtebModel, lm_eval_model.LmEvalModel

All other modules are internal: they may change in any release.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grit_jax.inference.gritlm import GritLM
    from grit_jax.inference.prompt_encoder import InputError
    from grit_jax.inference.sampling import Sampling
    from grit_jax.objectives.embedding import EmbeddingSpec

__all__ = ["EmbeddingSpec", "GritLM", "InputError", "Sampling"]
__version__ = "0.1.0"

_MODULES = {
    "EmbeddingSpec": "grit_jax.objectives.embedding",
    "GritLM": "grit_jax.inference.gritlm",
    "InputError": "grit_jax.inference.prompt_encoder",
    "Sampling": "grit_jax.inference.sampling",
}


def __getattr__(name: str) -> Any:
    # Names are imported on first use, because preparing data must not import JAX.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
