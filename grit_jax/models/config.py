"""The configuration of a model: its sizes, its features and how it is computed."""

from __future__ import annotations

from collections.abc import Collection
import dataclasses
import fnmatch

from jaxtyping import Bool, Float
import numpy as np

from grit_jax.models.rotary import FACTOR_LISTS, RopeScaling, rotary_frequencies

REMAT_NAMES = ("none", "save_matmuls", "offload", "full")
ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn")

# The splash kernel needs blocks whose size is a multiple of the lanes of a TPU's vector registers.
SPLASH_LANES = 128

# The types of layers: those with the sliding window, and those that attend to whole texts.
SLIDING, FULL = "sliding_attention", "full_attention"

# The field of `ModelConfig` that holds the size of each logical axis of the weights.
AXIS_FIELDS = {
    "vocab": "vocab_size",
    "embed": "hidden_size",
    "norm": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
    "experts": "num_local_experts",
    "router": "num_local_experts",
    "embedding": "embedding_projection_size",
    "embedding_hidden": "embedding_projection_hidden_size",
    "layers": "num_hidden_layers",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linear layers have a low-rank update (LoRA, arXiv 2106.09685), and its size.

    Attributes:
      rank: rank of the updates.
      alpha: updates are scaled by alpha / rank.
      targets: comma-separated shell patterns of layer names, such as
        "attention.*,feed_forward.gate".

    Raises:
      ValueError: a number is not positive; the message names the field.
    """

    rank: int
    alpha: float
    targets: str

    def __post_init__(self):
        for name in ("rank", "alpha"):
            if getattr(self, name) <= 0:
                raise ValueError(f"config.lora.{name}={getattr(self, name)} must be positive")

    def matching(self, layers: Collection[str]) -> list[str]:
        """Returns the layers that `targets` selects, in the order of `layers`.

        Raises:
          ValueError: a pattern matches no layer; the message names the pattern and the layers.
        """
        found: set[str] = set()
        for pattern in self.targets.split(","):
            matching = {n for n in layers if fnmatch.fnmatchcase(n, pattern.strip())}
            if not matching:
                raise ValueError(
                    f"config.lora.targets={self.targets!r}: {pattern!r} matches no linear layer; "
                    f"there are {', '.join(layers)}"
                )
            found |= matching
        return [layer for layer in layers if layer in found]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and features of a decoder, under the names of Hugging Face's config.json.

    The defaults are those of Mistral 7B. `make_config` has the defaults of every architecture.

    Attributes:
      architecture: name of the record in `models.ARCHITECTURES`.
      max_position_embeddings: longest text that the model was made for, in tokens.
      rope_theta: base of the rotary frequencies.
      rope_scaling: how they are scaled for long texts; None for no scaling.
      sliding_window: how far a token attends (`attention.window_size`); None for no limit.
      layer_types: `SLIDING` or `FULL` for each of the first layers, repeated for the others. Only
        sliding layers have the window. None: all layers are sliding.
      initializer_range: standard deviation of the token embeddings of an untrained model. Other
        weights are scaled by the number of their inputs.
      has_lm_head: whether the model computes logits; a model without a language model head only
        embeds.
      num_local_experts: experts of each feed-forward network; 0 for one dense network.
      num_experts_per_tok: experts that each token is sent to.
      norm_topk_prob: whether the weights of a token's experts are divided by their sum.
      router_aux_loss_coef: weight of the router's load-balancing loss.
      embedding_projection_size: output size of a linear layer applied to pooled hidden states;
        None for no such layer.
      embedding_projection_hidden_size: output size of another linear layer before it; None for no
        such layer (EmbeddingGemma has both).
      embedding_projection_bias: whether these layers have a bias.
      rope_local_base_freq: base of the rotary frequencies of sliding layers, which are not scaled;
        None for that of the other layers.
      query_pre_attn_scalar: attention scores are divided by its square root; None for `head_dim`.
      final_logit_softcapping: bound of the logits (`layers.soft_cap`); None for no bound.
      dtype: type of the computation.
      param_dtype: type of the parameters.
      logits_dtype: type of the logits.
      remat: what a layer saves for its backward pass (`remat.REMAT_POLICIES`).
      attention_implementation: one of `ATTENTION_IMPLEMENTATIONS`.
      splash_block_size: maximum block size of the splash attention kernel, in positions. A query
        block of 1,024 does 1,024 products for each byte of keys and values that it loads; a TPU
        v6e can do 560 in that time.
      lora: low-rank updates of linear layers; None for none.
      linear_dtype: "int8" stores the weights of linear layers in int8 with a scale for each output
        (`linear.round_to_int8`), for inference; None stores them in `param_dtype`.

    Raises:
      ValueError: a value is not possible; the message names the field.
    """

    architecture: str = "mistral"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    sliding_window: int | None = None
    layer_types: tuple | None = None
    tie_word_embeddings: bool = False
    has_lm_head: bool = True

    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = True
    router_aux_loss_coef: float = 0.0

    rope_local_base_freq: float | None = None
    query_pre_attn_scalar: float | None = None
    final_logit_softcapping: float | None = None

    embedding_projection_size: int | None = None
    embedding_projection_hidden_size: int | None = None
    embedding_projection_bias: bool = True
    dtype: str = "float32"
    param_dtype: str = "float32"
    logits_dtype: str = "float32"
    remat: str = "full"
    attention_implementation: str = "auto"
    splash_block_size: int = 1024
    lora: LoraConfig | None = None
    linear_dtype: str | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            # 0 turns a feature off.
            if value < 0 or (value == 0 and field.default != 0):
                raise ValueError(f"{typed_name(field.name)} must be positive, not {value}")
            if field.name in FLOATS:  # config.json may say 10000 for 10000.0.
                object.__setattr__(self, field.name, float(value))
        if self.layer_types is not None:
            object.__setattr__(self, "layer_types", tuple(self.layer_types))
            if not self.layer_types or set(self.layer_types) - {SLIDING, FULL}:
                raise ValueError(
                    f"{typed_name('layer_types')}={self.layer_types} must be a list of "
                    f"{SLIDING!r} and {FULL!r}"
                )
            if SLIDING in self.layer_types and self.sliding_window is None:
                raise ValueError(
                    f"{typed_name('layer_types')} has {SLIDING!r}: set "
                    f"{typed_name('sliding_window')}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.model.sizes.num_attention_heads={self.num_attention_heads} is not a "
                f"multiple of num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"config.model.sizes.head_dim={self.head_dim} must be even for rotary embeddings"
            )
        for name in FACTOR_LISTS:
            factors = self.rope_scaling and getattr(self.rope_scaling, name)
            if factors and len(factors) != self.head_dim // 2:
                raise ValueError(
                    f"config.model.sizes.rope_scaling: {name} must have head_dim/2 = "
                    f"{self.head_dim // 2} factors, not {len(factors)}"
                )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"config.model.sizes.num_experts_per_tok={self.num_experts_per_tok} is more than "
                f"num_local_experts={self.num_local_experts}"
            )
        if self.num_local_experts and not self.num_experts_per_tok:
            raise ValueError(
                "config.model.sizes.num_experts_per_tok must be positive where num_local_experts="
                f"{self.num_local_experts}"
            )
        for name, choices in {
            "dtype": ("float32", "bfloat16"),
            "param_dtype": ("float32", "bfloat16"),
            "logits_dtype": ("float32", "bfloat16"),
            "remat": REMAT_NAMES,
            "attention_implementation": ATTENTION_IMPLEMENTATIONS,
            "linear_dtype": (None, "int8"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{typed_name(name)}={getattr(self, name)!r} must be one of "
                    f"{', '.join(map(str, choices))}"
                )
        if self.splash_block_size % SPLASH_LANES:
            raise ValueError(
                f"config.model.splash_block_size={self.splash_block_size} must be a multiple of "
                f"{SPLASH_LANES}"
            )

    @property
    def has_experts(self) -> bool:
        """Whether feed-forward networks are mixtures of experts, with a router."""
        return self.num_local_experts > 0

    def sliding_layers(self) -> Bool[np.ndarray, " L"]:
        """Returns whether each layer is one with the sliding window."""
        types = self.layer_types or (SLIDING,)
        return np.resize(np.array(types) == SLIDING, self.num_hidden_layers)

    def rotary_frequencies(self) -> Float[np.ndarray, " half"]:
        """Returns the rotation of each pair of a head per position, in radians."""
        return rotary_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)

    def local_rotary_frequencies(self) -> Float[np.ndarray, " half"]:
        """Returns the same for sliding layers."""
        if self.rope_local_base_freq is None:
            return self.rotary_frequencies()
        return rotary_frequencies(self.head_dim, self.rope_local_base_freq)

    def layer_rotary_frequencies(self) -> Float[np.ndarray, "L half"]:
        """Returns the same for each layer."""
        is_sliding = self.sliding_layers()[:, None]
        return np.where(is_sliding, self.local_rotary_frequencies(), self.rotary_frequencies())

    @property
    def rotary_amplitude(self) -> float:
        """What queries and keys are multiplied by, in addition to their rotation."""
        return 1.0 if self.rope_scaling is None else self.rope_scaling.amplitude

    def size(self, axis: str) -> int:
        """Returns the size of a logical axis of the weights."""
        return getattr(self, AXIS_FIELDS[axis])

    def sharded_sizes(self) -> dict[str, tuple[str, int]]:
        """Returns the logical axis and the size of every field that a mesh may split.

        The keys are the names of the fields on the command line.
        """
        return {
            typed_name(field): (axis, size)
            for axis, field in AXIS_FIELDS.items()
            if axis not in ("norm", "router", "layers")
            and (size := getattr(self, field)) is not None
        }


def typed_name(field: str) -> str:
    """Returns the name of a field of `ModelConfig` on the command line of training."""
    return f"config.model.{field}" if field in SETTINGS else f"config.model.sizes.{field}"


# The fields that are floats, or None.
FLOATS = {field.name for field in dataclasses.fields(ModelConfig) if "float" in str(field.type)}

# Features that are off unless an architecture's record sets them.
FEATURES = (
    "layer_types",
    "num_local_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "router_aux_loss_coef",
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
)

# How a model is computed and trained: the fields that every architecture has besides its sizes.
SETTINGS = (
    "embedding_projection_size",
    "embedding_projection_hidden_size",
    "embedding_projection_bias",
    "dtype",
    "param_dtype",
    "logits_dtype",
    "remat",
    "attention_implementation",
    "splash_block_size",
    "lora",
    "linear_dtype",
)

# The sizes that every architecture has, with their defaults.
COMMON_SIZES = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.name not in ("architecture", *FEATURES, *SETTINGS)
}
