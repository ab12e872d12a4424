"""The fields of a training run's configuration. The defaults are GritLM 7B's hyperparameters.

A file in `configs/` starts from `default_config()` and changes fields of it, and
`--config.SECTION.FIELD=VALUE` on the command line overrides any field. `parse_config` checks the
result and returns it as a `Config`. `docs/configuration.md` is generated from the docstrings here.
"""

from collections.abc import Mapping
import dataclasses
from typing import Annotated, Any, Literal

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from grit_jax.fields import (
    BelowOne,
    Check,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    check_known,
    check_section,
    plain_fields,
)
from grit_jax.models import ModelConfig
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.sharding import MeshShape
from grit_jax.text.kinds import STREAMS
from grit_jax.training.checkpoints import RetentionPolicy
from grit_jax.training.joint_loss import LossConfig

# Former names of fields.
RENAMED = {
    "config.hang_seconds": "config.watchdog_timeout_seconds",
    "config.optimizer.warmup_fraction": "config.optimizer.warmup_ratio",
    "config.optimizer.clip_norm": "config.optimizer.max_grad_norm",
    "config.optimizer.most_skipped_in_a_row": "config.optimizer.max_consecutive_skips",
    "config.optimizer.moment_dtype": "config.optimizer.mu_dtype",
    "config.optimizer.token_embedding_factor": "config.optimizer.embedding_lr_multiplier",
    "config.data.copies_are_negatives": "config.data.duplicate_positives_are_negatives",
    "config.data.reading_threads": "config.data.data_threads",
}


# Value of fields that are read from the data.
AUTO = "auto"


class ConfigError(ValueError):
    """The configuration is wrong. The message names the field and says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The model, and the weights to start from.

    Attributes:
      weights: weights to start from: a Hugging Face folder, a GGUF file, a checkpoint or a run's
        folder. "" starts from random weights. With weights, `sizes` are those of the weights.
      architecture: "mistral" (also for Llama), "ministral3", "mixtral", "qwen2", "qwen3",
        "qwen3_moe" or "gemma3".
      sizes: sizes of the model, named as in Hugging Face's config.json. Sizes that are left out
        have the architecture's defaults.
      dtype: type of the computation: "bfloat16" or "float32".
      param_dtype: type of the parameters: "float32" or "bfloat16".
      logits_dtype: type of the logits: "float32", or "bfloat16" for half the memory at some cost in
        precision.
      remat: which activations are recomputed in the backward pass: "none"; "save_matmuls", all
        but the outputs of matrix products with weights; "offload", the same with the saved outputs
        in host memory; or "full", all of each layer.
      attention_implementation: "splash" (TPU), "cudnn" (GPU), "xla", or "auto": "splash" on TPUs
        where it supports the rows, otherwise "xla".
      splash_block_size: maximum block size of the splash attention kernel, in tokens. The actual
        block size divides the row length.
      attention: attention pattern: a letter each for the embedding instruction, the embedding text,
        the generation instruction and the generation text; b is bidirectional, c causal. "bbcc",
        "cbcc" or "cccc".
      pooling: how hidden states are pooled into an embedding: "mean", "weightedmean", "lasttoken"
        or "cls".
      embedding_projection_size: embedding size of a linear layer applied after pooling; 0 for no
        such layer.
    """

    weights: str = ""
    architecture: str = "mistral"
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"
    param_dtype: str = ModelConfig.param_dtype
    logits_dtype: str = ModelConfig.logits_dtype
    remat: str = ModelConfig.remat
    attention_implementation: str = ModelConfig.attention_implementation
    splash_block_size: int = ModelConfig.splash_block_size
    attention: str = EmbeddingSpec.attention
    pooling: str = EmbeddingSpec.pooling
    embedding_projection_size: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSection:
    """LoRA (arXiv 2106.09685): trains low-rank updates of linear layers.

    The weights from `config.model.weights` stay frozen. LoRA needs a higher learning rate, such as
    2e-4.

    Attributes:
      rank: rank of the updates; 0 trains all parameters instead.
      alpha: the updates are scaled by alpha / rank.
      targets: comma-separated names of linear layers, with shell wildcards. Each pattern must match
        a layer. The default leaves out Mixtral's router, which is smaller than its update.
      adapter: PEFT adapter or LoRA run whose matrices a new run starts from. The fields above must
        be those of the adapter; "" starts with new matrices.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: str = "attention.*,feed_forward.gate,feed_forward.up,feed_forward.down"
    adapter: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """AdamW (arXiv 1711.05101) with a learning rate schedule.

    Attributes:
      learning_rate: peak learning rate.
      schedule: decay of the learning rate to 0 after the warmup: "linear", "cosine" or "constant"
        (no decay).
      warmup_ratio: fraction of the steps in which the learning rate grows linearly from 0.
      beta1: decay rate of the first moment.
      beta2: decay rate of the second moment.
      epsilon: added to the square root of the second moment.
      weight_decay: weight decay of the model's parameters; multiplied by the learning rate.
      max_grad_norm: clip the global norm of the gradient to this.
      max_consecutive_skips: steps with a gradient that is not finite are skipped. Stop the run
        after more than this many in a row.
      mu_dtype: type of the first moment: "float32" or "bfloat16".
      embedding_lr_multiplier: learning rate of the token embeddings, as a multiple of
        `learning_rate`.
    """

    learning_rate: NonNegativeFloat = 2e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: BelowOne = 0.03
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.999
    epsilon: Annotated[
        float,
        Check(lambda value: value > 0, "must be positive: a zero gradient is divided by it"),
    ] = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: Annotated[
        float,
        Check(
            lambda value: value > 0,
            "must be positive; use a large value, such as 1e9, to disable clipping",
        ),
    ] = 1.0
    max_consecutive_skips: PositiveInt = 10
    mu_dtype: Literal["float32", "bfloat16"] = "float32"
    embedding_lr_multiplier: NonNegativeFloat = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSection:
    """Prepared data, batches and rows.

    Several texts are packed into a row.

    Attributes:
      folder: output folder of `grit-jax prepare`.
      sources: what `grit-jax prepare` reads, separated by spaces, as on its command line. With
        `--prepare`, training first prepares them if the folder lacks a mixture of the run.
      embedding: name of the mixture of embedding examples in that folder; "auto" is the only one.
      generative: name of the mixture of chats in that folder; "auto" is the only one.
      template: the format of the chats: "grit"; "base", the chat template of the base model; or
        "auto", the one that they were prepared with (`grit-jax prepare --template`).
      query_instruction: the instruction that the trained model embeds queries with by default. ""
        is none; "auto" is the one that all training queries have, if there is exactly one.
      document_instruction: the same for documents and the training passages.
      embedding_batch_size: queries per step, over all devices.
      generative_batch_size: chats per step, over all devices.
      group_size: passages per query: one positive, the others negatives.
      embedding_batches: "homogeneous" takes the examples of a step from one dataset, which makes
        the in-batch negatives harder. "mixed" takes them from all datasets.
      generative_batches: the same for chats: "homogeneous" or "mixed".
      duplicate_positives_are_negatives: whether copies of a query's positive among the passages of
        a step count as negatives, as in the original code.
      same_query_positives_are_negatives: whether the positives of a step's other lines with the
        same query count as negatives, as in the original code.
      query_row_length: maximum tokens per packed row of queries, and so per query. The actual row
        length is chosen to minimize padding. 0 takes the maximum from the data.
      passage_row_length: maximum tokens per packed row of passages; 0 takes it from the data.
      chat_row_length: maximum tokens per packed row of chats; 0 takes it from the data.
      row_length_multiple: row lengths are multiples of this. Splash attention on TPUs needs a
        multiple of 128.
      data_threads: threads that load and pack the next batches.
    """

    folder: str = "data/prepared"
    sources: str = ""
    embedding: str = "embedding"
    generative: str = "chat"
    template: Literal["auto", "grit", "base"] = AUTO
    query_instruction: str = AUTO
    document_instruction: str = AUTO
    embedding_batch_size: PositiveInt = 2048
    generative_batch_size: PositiveInt = 256
    group_size: PositiveInt = 2
    embedding_batches: Literal["homogeneous", "mixed"] = "homogeneous"
    generative_batches: Literal["homogeneous", "mixed"] = "mixed"
    duplicate_positives_are_negatives: bool = False
    same_query_positives_are_negatives: bool = False
    query_row_length: NonNegativeInt = 512
    passage_row_length: NonNegativeInt = 2560
    chat_row_length: NonNegativeInt = 2560
    row_length_multiple: PositiveInt = 128
    data_threads: PositiveInt = 2

    @property
    def row_lengths(self) -> dict[str, int]:
        """The maximum row length of each stream."""
        return {stream: getattr(self, f"{stream}_row_length") for stream in STREAMS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSection(RetentionPolicy):
    """When checkpoints are saved, and which are kept.

    Attributes:
      every_steps: save a checkpoint every this many steps, and after the first and the last.
    """

    every_steps: PositiveInt = 250


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    """Retrieval and perplexity on held-out data.

    Attributes:
      enabled: whether to evaluate before and after training.
      every_steps: also evaluate every this many steps; 0 disables it.
      batch_size: texts per batch.
    """

    enabled: bool = False
    every_steps: NonNegativeInt = 0
    batch_size: PositiveInt = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileSection:
    """A profiler trace of some steps, written to `profile/` in the working directory.

    Attributes:
      first_step: first step in the trace; at least 2, since step 1 compiles.
      num_steps: number of steps in the trace; 0 disables it.
    """

    first_step: Annotated[
        int, Check(lambda value: value >= 2, "must be at least 2: the first step compiles")
    ] = 10
    num_steps: NonNegativeInt = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The configuration of a training run.

    Attributes:
      mode: losses to train on: "unified" (both), "embedding" or "generative"; "auto" trains on the
        kinds of data in `config.data.folder`.
      steps: number of training steps.
      epochs: passes over the data. Above 0, it sets `steps`, so that every example is drawn about
        this many times or more.
      seed: seed of random parameters, the order of the data and the choice of passages.
      log_every_steps: log metrics every this many steps.
      watchdog_timeout_seconds: exit (so that a supervisor restarts the run) if no step completes
        within this many seconds; 0 disables it.
      tracker: also send metrics to "wandb", "trackio" or "mlflow", whose package must be installed
        and is set up by its environment variables; "tensorboard" only writes the events in the
        working directory, as all runs do.
      grad_cache_chunks: number of chunks that a step's batch is split into to save memory
        (GradCache, arXiv 2101.06983). With more than 1, embedding texts go through the model twice.
      model: the model, and the weights to start from.
      lora: LoRA.
      loss: the joint loss.
      optimizer: AdamW and its learning rate.
      data: prepared data, batches and rows.
      mesh: devices per mesh axis.
      checkpoint: when checkpoints are saved, and which are kept.
      evaluation: retrieval and perplexity on held-out data.
      profile: a profiler trace.
    """

    mode: Literal["unified", "embedding", "generative", "auto"] = "unified"
    steps: PositiveInt = 1253
    epochs: NonNegativeFloat = 0.0
    seed: int = 0
    log_every_steps: PositiveInt = 10
    watchdog_timeout_seconds: NonNegativeFloat = 1800.0
    tracker: Literal["tensorboard", "wandb", "trackio", "mlflow"] = "tensorboard"
    grad_cache_chunks: PositiveInt = 1
    model: ModelSection = dataclasses.field(default_factory=ModelSection)
    lora: LoraSection = dataclasses.field(default_factory=LoraSection)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerSection = dataclasses.field(default_factory=OptimizerSection)
    data: DataSection = dataclasses.field(default_factory=DataSection)
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    checkpoint: CheckpointSection = dataclasses.field(default_factory=CheckpointSection)
    evaluation: EvaluationSection = dataclasses.field(default_factory=EvaluationSection)
    profile: ProfileSection = dataclasses.field(default_factory=ProfileSection)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as nested dictionaries."""
        sections = {
            name: {field: getattr(getattr(self, name), field) for field in plain_fields(section)}
            for name, section in SECTIONS.items()
        }
        return {name: getattr(self, name) for name in plain_fields(Config)} | sections


SECTIONS: dict[str, type] = {
    field.name: field.type  # pyright: ignore[reportAssignmentType]
    for field in dataclasses.fields(Config)
    if dataclasses.is_dataclass(field.type)
}


def default_config() -> Any:
    """Returns a `ConfigDict` with every field at its default, to be changed."""
    return ConfigDict(Config().to_dict())


def parse_config(config: ConfigDict) -> Config:
    """Checks a configuration and returns it with its types.

    Raises:
      ConfigError: a field is unknown, missing, of the wrong type or out of range.
    """
    values = config.to_dict()
    for name in flatten_dict(values, sep="."):
        check_not_renamed(f"config.{name}")
    plain = {name: value for name, value in values.items() if name not in SECTIONS}
    try:
        for name in plain:
            check_known(f"config.{name}", (*plain_fields(Config), *SECTIONS))
        fields = check_section(Config, plain, "config")
        for name, section in SECTIONS.items():
            fields[name] = section(**check_section(section, values.get(name, {}), f"config.{name}"))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    fields["loss"] = dataclasses.replace(fields["loss"], embedding=_embedding_spec(fields["model"]))
    parsed = Config(**fields)
    _check_best_metric(parsed)
    return parsed


def check_not_renamed(name: str) -> None:
    """Refuses the former name of a field, such as "config.hang_seconds", with its new name."""
    if name in RENAMED:
        raise ConfigError(f"{name} is now {RENAMED[name]}")


def changed_fields(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a line for each field with another value than in an earlier start of a run.

    Args:
      before: the fields of the earlier start, as nested dictionaries. It may be of another version
        of grit-jax: fields that it does not have are left out.
      now: the fields of this start.
    """
    old = {f"config.{name}": value for name, value in flatten_dict(dict(before), sep=".").items()}
    old = {RENAMED.get(name, name): value for name, value in old.items()}
    new = {f"config.{name}": value for name, value in flatten_dict(dict(now), sep=".").items()}
    return [
        f"{name}: {old[name]!r} -> {value!r}"
        for name, value in new.items()
        if name in old and old[name] != value
    ]


def _embedding_spec(model: ModelSection) -> EmbeddingSpec:
    try:
        return EmbeddingSpec(attention=model.attention, pooling=model.pooling)
    except ValueError as error:
        raise ConfigError(f"config.model.{error}") from None


def _check_best_metric(config: Config) -> None:
    every = config.evaluation.every_steps
    is_evaluated = config.evaluation.enabled and every > 0
    if not config.checkpoint.best_metric:
        return
    if not is_evaluated or config.checkpoint.every_steps % every:
        raise ConfigError(
            f"config.checkpoint.best_metric={config.checkpoint.best_metric!r} needs an evaluation "
            "at every checkpoint: set config.evaluation.enabled, and config.checkpoint.every_steps "
            "to a multiple of config.evaluation.every_steps"
        )
