"""The record of an architecture: its sizes, weights, feed-forward network and config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

from flax import nnx

from grit_jax.models.config import (
    COMMON_SIZES,
    FEATURES,
    FLOATS,
    FULL,
    SLIDING,
    ModelConfig,
    typed_name,
)
from grit_jax.models.rotary import RopeScaling
from grit_jax.models.weights import WeightTable, linear_layers

# What transformers assumes for a field that config.json leaves out.
TRANSFORMERS_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "sliding_window": None,
    "tie_word_embeddings": False,
    # Not fields of transformers: an embedding model may be saved without its language model head,
    # and a sentence-transformers folder stores the projection.
    "has_lm_head": True,
    "embedding_projection_size": None,
    "embedding_projection_hidden_size": None,
    "embedding_projection_bias": True,
}

# Fields of config.json that would change the computation, and the supported values of each.
SUPPORTED_VALUES = {
    "hidden_act": ("silu", "swish"),  # Two names of one function.
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
}

# Fields of config.json that do not change the computation. Besides these there are private fields,
# whose names begin with "_".
IGNORED_FIELDS = frozenset(
    """
    architectures auto_map dtype grit is_causal model_type name_or_path tokenizer_class torch_dtype
    torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version
    use_bfloat16 use_bidirectional_attention use_cache use_flash_attn

    bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id

    finetuning_task id2label label2id num_labels prefix problem_type task_specific_params
    chunk_size_feed_forward output_attentions output_hidden_states output_router_logits
    pretraining_tp pruned_heads return_dict tf_legacy_loss tie_encoder_decoder
    add_cross_attention cross_attention_hidden_size is_decoder is_encoder_decoder

    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    max_sequence_length min_length no_repeat_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    target_lookbehind temperature top_k top_p typical_p
    """.split()  # noqa: SIM905  It reads better.
)
# Fields that change the computation unless they have this value.
IGNORED_VALUES = {
    "attention_dropout": 0.0,
    "is_llama_config": True,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "router_jitter_noise": 0.0,
}


# Fields of `rope_parameters` that every type may have. The last has no effect there.
ROPE_FIELDS = ("type", "rope_type", "rope_theta", "max_position_embeddings")
# The length of pretraining, which these types read from `rope_parameters` or outside of it.
ORIGINAL = "original_max_position_embeddings"
TYPES_WITH_ORIGINAL = ("llama3", "yarn", "longrope")
# A field of `rope_parameters` that transformers reads only for some model types.
QUERY_SCALING = "llama_4_scaling_beta"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceFormat:
    """A `model_type` of Hugging Face's config.json.

    Attributes:
      model_type: its name.
      class_name: the class of transformers, with a language model head.
      headless_class_name: the class without the head; by default the same with "Model" for
        "ForCausalLM".
      defaults: the fields that `ModelConfig` takes from config.json, and the values that
        transformers assumes where the file leaves them out. Without "head_dim", a head has
        hidden_size / num_attention_heads dimensions.
      reads_layer_types: whether `layer_types`, or without it `Architecture.layer_types`, says which
        layers have a sliding window.
      other_defaults: the fields that only methods of the `Architecture` read, and the values that
        transformers assumes for them.
      other_names: names in config.json of fields that `ModelConfig` names differently. The first
        that a file has is read; the last is written.
      ignored: fields that do not change the computation in this format.
    """

    model_type: str
    class_name: str
    defaults: Mapping[str, Any]
    headless_class_name: str | None = None
    reads_layer_types: bool = False
    other_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    other_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    def names(self, field: str) -> tuple[str, ...]:
        """Returns the names in config.json of a field of `ModelConfig`; see `other_names`."""
        return self.other_names.get(field, (field,))

    def sizes(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of `ModelConfig` that a config.json has, and the other defaults."""
        return {
            field: next((fields[name] for name in self.names(field) if name in fields), default)
            for field, default in self.defaults.items()
        }

    def class_for(self, config: ModelConfig) -> str:
        """Returns the class of transformers for a model with or without its language model head."""
        if config.has_lm_head:
            return self.class_name
        return self.headless_class_name or self.class_name.replace("ForCausalLM", "Model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything in which an architecture differs from the others.

    Attributes:
      name: value of `config.model.architecture`.
      defaults: sizes of the released model that differ from `COMMON_SIZES`, and the features of
        `ModelConfig` that the architecture has.
      weights: returns the table of weights of a configuration.
      feed_forward: module class of the feed-forward network.
      formats: the formats of config.json that it reads; it writes the first.
      scales_queries: whether `llama_4_scaling_beta` in `rope_parameters` has an effect.
      supported_values: fields of config.json with few supported values, and those values.
    """

    name: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: Callable[[ModelConfig], WeightTable]
    feed_forward: type[nnx.Module]
    formats: tuple[HuggingFaceFormat, ...]
    scales_queries: bool = False
    supported_values: Mapping[str, tuple[Any, ...]] = dataclasses.field(
        default_factory=lambda: SUPPORTED_VALUES
    )

    @property
    def sizes(self) -> dict[str, Any]:
        """All sizes of the architecture, with their defaults."""
        return {**COMMON_SIZES, **self.defaults}

    def causal_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the content of a config.json, as it is for causal attention."""
        return dict(fields)

    def bidirectional_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the content of a config.json, as it is for bidirectional attention.

        Args:
          fields: the result of `causal_fields`.
        """
        # text-embeddings-inference reads the second name.
        return {**fields, "is_causal": False, "use_bidirectional_attention": True}

    def embedding_scale(self, config: ModelConfig) -> float:
        """Returns what token embeddings are multiplied by."""
        del config
        return 1.0

    def matmul_flops_per_token(self, config: ModelConfig) -> float:
        """Returns the operations of the linear layers for one token, in a forward pass.

        The attention scores and the logits are not included.
        """
        layers = linear_layers(self.weights(config)).values()
        weights = sum(spec.weights_per_token(config) for spec in layers)
        return 2.0 * config.num_hidden_layers * weights

    def config_from_hugging_face(self, fields: Mapping[str, Any]) -> ModelConfig:
        """Returns the configuration that the content of a config.json describes.

        Raises:
          ValueError: a field has a value that is not supported; the message names the field.
        """
        for name, supported in self.supported_values.items():
            if fields.get(name, supported[0]) not in supported:
                raise ValueError(
                    f"config.json: {name}={fields[name]!r} is not supported, only {supported[0]!r}"
                )
        if quantization := fields.get("quantization_config"):
            raise ValueError(
                f"config.json: the weights are quantized ({quantization.get('quant_method')!r} in "
                "quantization_config), which is not supported: use the model that they were made of"
            )
        written = self._format(fields)
        for name, default in written.other_defaults.items():
            fields = {**fields, name: default if fields.get(name) is None else fields[name]}
        sizes = written.sizes(fields)
        if written.reads_layer_types:
            sizes |= self._windows(fields, sizes)
        sizes |= self.rotary(fields, sizes)
        for name in FLOATS & sizes.keys():  # JSON may have 10000 for 10000.0.
            sizes[name] = None if sizes[name] is None else float(sizes[name])
        sizes["num_key_value_heads"] = sizes["num_key_value_heads"] or sizes["num_attention_heads"]
        sizes["head_dim"] = (
            fields.get("head_dim")
            or sizes.get("head_dim")
            or sizes["hidden_size"] // sizes["num_attention_heads"]
        )
        features = {name: self.defaults[name] for name in FEATURES if name in self.defaults}
        try:
            return ModelConfig(architecture=self.name, **{**features, **sizes})
        except ValueError as error:  # It has the name of the field in a run's configuration.
            raise ValueError(f"config.json: {str(error).replace(typed_name(''), '')}") from None

    def layer_types(self, fields: Mapping[str, Any]) -> Sequence[str]:
        """Returns the type of each layer for a config.json without `layer_types`.

        Args:
          fields: the content of config.json, with the defaults of its format.
        """
        return [SLIDING] * fields["num_hidden_layers"]

    def rotary(self, fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of `ModelConfig` for the rotary embeddings.

        Args:
          fields: the content of config.json.
          sizes: the other fields of `ModelConfig`.

        Raises:
          ValueError: the scaling is not supported, or differs between layers.
        """
        name, parameters = _rope_parameters(fields)
        if any(isinstance(value, dict) for value in parameters.values()):
            raise ValueError(
                f"config.json: {name} differs between layers ({', '.join(parameters)}), which is "
                f"not supported for model_type={fields['model_type']!r}"
            )
        theta, scaling = read_rotary(name, parameters, fields, sizes)
        can_scale_queries = self.scales_queries and scaling is not None
        if parameters.get(QUERY_SCALING) is not None and not can_scale_queries:
            raise ValueError(
                f"config.json: {name}: {QUERY_SCALING} is not supported for model_type="
                f"{fields['model_type']!r} with rope_type={_rope_type(parameters)!r}"
            )
        return {"rope_theta": theta, "rope_scaling": scaling}

    def _windows(self, fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
        """Returns `sliding_window` and `layer_types`, which is None if all layers are alike.

        Raises:
          ValueError: a type is not supported, or there are too few or too many.
        """
        named = fields.get("layer_types")
        types = list(named or self.layer_types({**fields, **sizes}))
        window, num_layers = sizes["sliding_window"], sizes["num_hidden_layers"]
        if unknown := sorted(set(types) - {SLIDING, FULL}):
            raise ValueError(
                f"config.json: layers of type {', '.join(unknown)} in layer_types are not "
                f"supported, only {SLIDING!r} and {FULL!r}"
            )
        if len(types) != num_layers:
            raise ValueError(
                f"config.json: layer_types has {len(types)} layers, but num_hidden_layers="
                f"{num_layers}"
            )
        if named and SLIDING in types and window is None:
            raise ValueError(
                f"config.json: layer_types has {SLIDING!r}, but sliding_window is not set"
            )
        if len(set(types)) == 1:
            return {"sliding_window": window if types[0] == SLIDING else None, "layer_types": None}
        period = next(n for n in range(1, num_layers + 1) if types[n:] == types[:-n])
        return {"sliding_window": window, "layer_types": tuple(types[:period])}

    def unread_fields(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields of a config.json that may matter but are not read.

        Fields without a value are left out, and those that are known not to matter.
        """
        written = self._format(fields)
        read = {name for field in written.defaults for name in written.names(field)}
        read |= {*written.other_defaults, *self.supported_values, *written.ignored}
        read |= {"head_dim", "num_key_value_heads"}
        read |= {"rope_theta", "rope_parameters", "rope_scaling", "quantization_config"}
        if written.reads_layer_types:
            read.add("layer_types")
        name, rope = _rope_parameters(fields)
        if _rope_type(rope) in TYPES_WITH_ORIGINAL:
            read.add(ORIGINAL)
        rope = {} if _rope_type(rope) != "default" else rope  # `_rotary` checks the others.
        rope = {
            f"{name}.{key}": value
            for key, value in rope.items()
            if key not in ROPE_FIELDS and not isinstance(value, dict)
        }
        return {
            name: value
            for name, value in {**fields, **rope}.items()
            if value is not None
            and name not in IGNORED_FIELDS | read
            and not name.startswith("_")
            and IGNORED_VALUES.get(name.rpartition(".")[2]) != value
        }

    def _format(self, fields: Mapping[str, Any]) -> HuggingFaceFormat:
        (written,) = (f for f in self.formats if f.model_type == fields["model_type"])
        return written

    def config_to_hugging_face(self, config: ModelConfig) -> dict[str, Any]:
        """Returns the content of a config.json that old and new versions of transformers read."""
        written, scaling = self.formats[0], config.rope_scaling
        names = (*written.defaults, "head_dim")
        fields = {written.names(name)[-1]: getattr(config, name) for name in names}
        if config.layer_types is not None:
            types = [SLIDING if is_sliding else FULL for is_sliding in config.sliding_layers()]
            fields["layer_types"] = types
        if config.embedding_projection_size is None:
            fields = {n: v for n, v in fields.items() if not n.startswith("embedding_projection_")}
        if config.has_lm_head:
            del fields["has_lm_head"]
        return {
            "architectures": [written.class_for(config)],
            "model_type": written.model_type,
            **fields,
            "rope_parameters": {
                **({"rope_type": "default"} if scaling is None else scaling.to_fields()),
                "rope_theta": config.rope_theta,
            },
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


def _rope_parameters(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the field with the parameters of the rotary embeddings, and its content.

    `rope_scaling`, the older name, goes before `rope_parameters`, as in transformers.
    """
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    return name, dict(fields.get(name) or {})


def _rope_type(parameters: Mapping[str, Any]) -> str:
    return parameters.get("rope_type", parameters.get("type", "default"))


def read_rotary(
    name: str, parameters: Mapping[str, Any], fields: Mapping[str, Any], sizes: Mapping[str, Any]
) -> tuple[float, RopeScaling | None]:
    """Returns the base of the rotary frequencies, and their scaling.

    Args:
      name: the field of config.json that has the parameters.
      parameters: its content.
      fields: the content of config.json.
      sizes: fields of `ModelConfig`, defaults included.

    Raises:
      ValueError: the scaling is not supported.
    """
    theta = parameters.get("rope_theta") or fields.get("rope_theta") or sizes["rope_theta"]
    rope_type = _rope_type(parameters)
    if rope_type == "default":
        return float(theta), None
    # Like transformers, which moves these two fields to the others.
    scaling = {"partial_rotary_factor": fields.get("partial_rotary_factor"), **parameters}
    scaling = {key: value for key, value in scaling.items() if key not in ROPE_FIELDS}
    if scaling["partial_rotary_factor"] in (None, 1.0):
        del scaling["partial_rotary_factor"]
    longest = sizes["max_position_embeddings"]
    if rope_type in TYPES_WITH_ORIGINAL:
        scaling[ORIGINAL] = fields.get(ORIGINAL) or scaling.get(ORIGINAL) or longest
    elif rope_type == "dynamic":
        scaling[ORIGINAL] = longest
    if rope_type in ("yarn", "longrope") and scaling.get("factor") is None:
        scaling["factor"] = longest / scaling[ORIGINAL]
    try:
        return float(theta), RopeScaling.from_fields({"rope_type": rope_type, **scaling})
    except ValueError as error:
        raise ValueError(f"config.json: {name}: {error}") from None
