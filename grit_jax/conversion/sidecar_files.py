"""The files next to the weights of an export: tokenizer, chat template, pooling settings."""

import itertools
import json
from pathlib import Path
import shutil
from typing import Any

from grit_jax.files import write_json
from grit_jax.models import ModelConfig
from grit_jax.models.weights import DENSE
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.text.templates import exported_chat_template
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.text.tokenizer_files import CHAT_TEMPLATE, HUGGING_FACE, SENTENCEPIECE

FILES = Path(__file__).with_name("files")
TRANSFORMER, TOKENIZER = "grit_transformer.py", "grit_tokenizer.py"
# For these models transformers 5 takes Qwen2's tokenizer, which overrides parts of tokenizer.json,
# unless the settings name a class in the folder.
OVERRIDDEN_TOKENIZERS = ("qwen2",)
# Files of sentence-transformers: the modules of a model, the settings of the first of them, and
# those of the whole model, among them its prompts.
MODULES, TRANSFORMER_SETTINGS = "modules.json", "sentence_bert_config.json"
SENTENCE_TRANSFORMERS = "config_sentence_transformers.json"
# The first module. Versions of sentence-transformers that may come with a version of transformers
# without bidirectional attention do not have the second name, and refuse the model.
TRANSFORMER_CLASS = "sentence_transformers.models.Transformer"
BIDIRECTIONAL_CLASS = "sentence_transformers.base.modules.transformer.Transformer"
# The activation function of a linear layer without one.
IDENTITY = "torch.nn.modules.linear.Identity"
# The field of the settings of pooling that switches each pooling on.
POOLING_FIELDS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def write_tokenizer(tokenizer: Tokenizer, folder: Path, model_type: str, max_length: int) -> None:
    """Writes a tokenizer for transformers that begins and ends texts as it does here.

    Args:
      tokenizer: the model's tokenizer.
      folder: the folder to write to.
      model_type: the model's type in config.json.
      max_length: the longest text that the model supports, in tokens.

    Raises:
      TokenizerError: no tokenizer.json has the same ids.
    """
    # Few models have a padding token. Padding is masked, so that any token will do.
    special = tokenizer.special_tokens | {"pad_token": tokenizer.special_tokens["eos_token"]}
    settings: dict[str, Any] = {
        # It follows tokenizer.json; other classes override parts of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.adds_bos,
        "add_eos_token": tokenizer.adds_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "right",
    }
    if model_type in OVERRIDDEN_TOKENIZERS:
        shutil.copyfile(FILES / TOKENIZER, folder / TOKENIZER)
        settings["auto_map"] = {"AutoTokenizer": [None, "grit_tokenizer.GritTokenizer"]}
    (folder / HUGGING_FACE).write_bytes(tokenizer.exported())
    if tokenizer.sentencepiece_model is not None:  # llama.cpp converts this one.
        (folder / SENTENCEPIECE).write_bytes(tokenizer.sentencepiece_model)
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", settings | special)


def write_chat_template(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes the chat template of a tokenizer or, without one, GRIT's."""
    template = tokenizer.chat_template or exported_chat_template(adds_bos=tokenizer.adds_bos)
    (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    # Versions of transformers before 4.43 read it from the tokenizer's settings.
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", settings | {"chat_template": template})


def needs_code(spec: EmbeddingSpec) -> bool:
    """Returns whether sentence-transformers needs code of the export's own.

    Its module for "weightedmean" counts the tokens of a prompt, even if it does not pool them.
    """
    return spec.pooling == "weightedmean" and not spec.pool_instruction


def write_sentence_transformers(folder: Path, config: ModelConfig, spec: EmbeddingSpec) -> None:
    """Writes the settings with which sentence-transformers computes the model's embeddings.

    They make attention bidirectional even if config.json describes a causal model, as long as it
    has the field `is_causal`.
    """
    is_bidirectional = spec.attention[1] == "b"
    # "</s>" in a text is four characters, not a special token.
    settings: dict[str, Any] = {"tokenizer_args": {"split_special_tokens": True}}
    if is_bidirectional:
        settings["config_args"] = {"is_causal": False}
    if needs_code(spec):
        shutil.copyfile(FILES / TRANSFORMER, folder / TRANSFORMER)
        first, settings = "grit_transformer.GritTransformer", {}
    else:
        first = BIDIRECTIONAL_CLASS if is_bidirectional else TRANSFORMER_CLASS
    modules = [(first, ""), ("sentence_transformers.models.Pooling", "1_Pooling")]
    sizes = config.embedding_projection_hidden_size, config.embedding_projection_size
    sizes = [config.hidden_size, *(size for size in sizes if size is not None)]
    for name, (num_inputs, num_outputs) in zip(DENSE, itertools.pairwise(sizes), strict=False):
        _write_dense_settings(
            folder / name, num_inputs, num_outputs, config.embedding_projection_bias
        )
        modules.append(("sentence_transformers.models.Dense", name))
    if spec.normalize:
        path = f"{len(modules)}_Normalize"
        (folder / path).mkdir()
        modules.append(("sentence_transformers.models.Normalize", path))
    write_json(
        folder / MODULES,
        [
            {"idx": i, "name": str(i), "path": path, "type": kind}
            for i, (kind, path) in enumerate(modules)
        ],
    )
    (folder / "1_Pooling").mkdir()
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": config.hidden_size,
            **{field: pooling == spec.pooling for pooling, field in POOLING_FIELDS.items()},
            # These two take one token, wherever the prompt ends.
            "include_prompt": spec.pool_instruction or spec.pooling in ("lasttoken", "cls"),
        },
    )
    # As `GritLM.encode` by default.
    max_length = min(512, config.max_position_embeddings)
    write_json(
        folder / TRANSFORMER_SETTINGS,
        {"max_seq_length": max_length, "do_lower_case": False, **settings},
    )
    write_json(
        folder / SENTENCE_TRANSFORMERS,
        {
            "prompts": {"query": spec.query_prompt, "document": spec.document_prompt},
            "default_prompt_name": "document",
            "similarity_fn_name": "cosine",
        },
    )


def _write_dense_settings(folder: Path, num_inputs: int, num_outputs: int, has_bias: bool) -> None:
    folder.mkdir()
    settings = {
        "in_features": num_inputs,
        "out_features": num_outputs,
        "bias": has_bias,
        "activation_function": IDENTITY,
    }
    write_json(folder / "config.json", settings)
