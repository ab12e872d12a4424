"""What a configuration asks for: model, trainer, batches, held-out data, checkpoints.

Nothing here computes. What is wrong with a configuration or its data shows here, in one line.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict
import jax
from jax.sharding import Mesh
import optax

from grit_jax.bucket import in_bucket
from grit_jax.config import NOT_TRAINED_WITH, Config, ConfigError
from grit_jax.conversion import ConversionError, Model, open_model
from grit_jax.conversion.stored_tokenizer import find_tokenizer
from grit_jax.data.batches import Batches
from grit_jax.data.manifest import (
    PreparedDataError,
    PreparedDataset,
    load_mixture,
    load_saved_tokenizer,
    saved_tokenizer_files,
)
from grit_jax.data.mixing import stable_seed
from grit_jax.data.sampling import MixedSampler, Sampler, SingleDatasetSampler
from grit_jax.data.shapes import RowLimits
from grit_jax.evaluation.held_out import HeldOut
from grit_jax.models import (
    AttentionError,
    LoraConfig,
    ModelConfig,
    lora_layers,
    make_config,
)
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.processes import broadcast_from_primary
from grit_jax.sharding import batch_shards, local_shards, make_mesh
from grit_jax.text.kinds import STREAMS, TEXT_KINDS
from grit_jax.text.tokenizer import TokenizerError, tokenizer_in
from grit_jax.training.checkpoints import Checkpoints, RetentionPolicy
from grit_jax.training.joint_loss import LossConfig, make_joint_loss
from grit_jax.training.optimizer import learning_rate_schedule, make_optimizer
from grit_jax.training.train_step import Trainer

Datasets = dict[PreparedDataset, float]

# Fields of `config.model` that are the model's own, whatever weights it starts from.
MODEL_SETTINGS = (
    "dtype",
    "param_dtype",
    "logits_dtype",
    "remat",
    "attention_implementation",
    "splash_block_size",
)
# Two tokenizers that make the same tokens of it are taken for one in two formats.
SAMPLE_TEXT = "What 3 words mean, in 2026: na\u00efve, \u0441\u043b\u043e\u0432\u043e, \u8a9e."


def make_checkpoints(
    config: Config,
    trainer: Trainer,
    batches: Batches,
    folder: epath.Path,
    pretrained: Model | None = None,
) -> Checkpoints:
    """Returns the checkpoints of a run, which only a run on the same data continues.

    Low-rank updates are continued only on top of the weights that they were trained on, wherever
    those lie by then. Each checkpoint says how the model embeds, and has the tokenizer that the
    data were prepared with.

    Raises:
      CheckpointError: the folder cannot be written to.
      PreparedDataError: a file of the tokenizer is missing.
    """
    settings = config.checkpoint.to_dict()
    every_steps = settings.pop("every_steps")
    trained = {
        "param_dtype": config.model.param_dtype,
        "mu_dtype": config.optimizer.mu_dtype,
        "learn_temperature": config.loss.learn_temperature,
    }
    data = {"seed": config.seed, **batches.description}
    description = {"data": data, "trained": trained}
    base_folder = None
    if trainer.model_config.lora is not None and pretrained is not None:
        updates = dataclasses.asdict(trainer.model_config.lora)
        description["lora"] = {**updates, "base": pretrained.fingerprint()}
        base_folder = str(pretrained.folder.resolve())
    dataset = batches.datasets[0]
    described = dataset.manifest.tokenizer
    usage = {
        **embedding_spec(config).to_fields(),
        "bos_token_id": described.get("bos_id", 1),
        "eos_token_id": described.get("eos_id", 2),
    }
    tokenizer = saved_tokenizer_files(dataset)
    return Checkpoints(
        folder,
        trainer.model_config,
        description,
        every_steps,
        RetentionPolicy(**settings),
        base_folder,
        usage,
        tokenizer if broadcast_from_primary(bool(tokenizer)) else None,
    )


def open_pretrained(config: Config) -> Model | None:
    """Opens the weights that a configuration starts from, None if it starts at random.

    Raises:
      ConfigError: there is no model, or one of another architecture; the message names it.
    """
    if not config.model.weights:
        return None
    try:
        pretrained = open_model(config.model.weights)
    except (ConversionError, OSError) as error:
        raise ConfigError(f"config.model.weights: {error}") from None
    architecture = pretrained.config.architecture
    if config.model.architecture != architecture:
        raise ConfigError(
            f"config.model.architecture={config.model.architecture!r}, but of "
            f"{config.model.weights} it is {architecture!r}"
        )
    return pretrained


def make_trainer(
    config: Config,
    pretrained: Model | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Trainer:
    """Returns the trainer of a configuration.

    Args:
      config: the configuration.
      pretrained: the model that it starts from, whose sizes count.
      devices: those of the mesh, by default all there are.

    Raises:
      ConfigError, MeshError: the message names the field.
    """
    settings = config.optimizer.to_dict()
    for of_the_run in ("learning_rate", "warmup_ratio", "schedule", "max_consecutive_skips"):
        settings.pop(of_the_run)
    return Trainer(
        model_config(config, pretrained),
        make_joint_loss(loss_config(config)),
        make_optimizer(make_schedule(config), **settings),
        make_mesh(**config.mesh.to_dict(), devices=devices),
        config.grad_cache_chunks,
    )


def model_config(config: Config, pretrained: Model | None = None) -> ModelConfig:
    """Returns the model's configuration, with the sizes of the model it starts from.

    Raises:
      ConfigError: a size is unknown, impossible or not the pretrained model's; the message names
        the field.
    """
    settings = {name: config.model[name] for name in MODEL_SETTINGS}
    sizes = config.model.sizes.to_dict()
    projection = config.model.embedding_projection_size
    if projection:
        settings["embedding_projection_size"] = projection
    try:
        settings["lora"] = _lora_config(config, pretrained)
        if misplaced := ", ".join(sorted(settings.keys() & sizes.keys())):
            raise ConfigError(f"config.model.sizes.{misplaced}: a field outside of sizes sets it")
        if not_trained := ", ".join(name for name in NOT_TRAINED_WITH if sizes.get(name)):
            raise ConfigError(f"config.model.sizes.{not_trained} is of models that are not trained")
        if pretrained is None:
            return make_config(config.model.architecture, **sizes, **settings)
        _check_sizes(sizes, pretrained)
        stored = pretrained.config.embedding_projection_size
        if projection and stored not in (None, projection):
            raise ConfigError(
                f"config.model.embedding_projection_size={projection}, but {pretrained.folder} "
                f"has a projection to {stored}; leave it at 0 to keep that"
            )
        adapted = dataclasses.replace(pretrained.config, **settings)
        lora_layers(adapted)  # Raises if a pattern of targets matches no layer.
        return adapted
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _lora_config(config: Config, pretrained: Model | None) -> LoraConfig | None:
    """Returns the configuration of the low-rank updates, None if all parameters are trained."""
    if not config.lora.rank:
        return None
    if pretrained is None:
        # Random weights would have to be saved with each checkpoint, and there is nothing in them
        # that is worth keeping.
        raise ConfigError(
            f"config.lora.rank={config.lora.rank} needs config.model.weights: what the updates "
            "are added to is not trained, nor saved with them"
        )
    if in_bucket(pretrained.folder):
        raise ConfigError(
            f"config.lora.rank={config.lora.rank} needs config.model.weights on a disk of each "
            f"host, not {pretrained.folder}: gcloud storage cp -r copies them"
        )
    return LoraConfig(**config.lora.to_dict())


def _check_sizes(sizes: dict[str, Any], pretrained: Model) -> None:
    """Checks that no size was asked for that the pretrained model does not have.

    A size at its default was not asked for: the command line fills them in.
    """
    defaults = type(pretrained.config)()
    for name, size in sizes.items():
        theirs = getattr(pretrained.config, name, None)
        if size not in (theirs, getattr(defaults, name, None)):
            raise ConfigError(
                f"config.model.sizes.{name}={size!r}, but {pretrained.folder} has {theirs!r}; with "
                "config.model.weights, leave sizes out, in the --config file, too (as "
                "configs/gritlm_7b.py does)"
            )


def loss_config(config: Config) -> LossConfig:
    """Returns the joint loss's configuration.

    Raises:
      ConfigError: a name is unknown or a number impossible; the message names the field.
    """
    try:
        return LossConfig(**config.loss.to_dict(), embedding=embedding_spec(config))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def embedding_spec(config: Config) -> EmbeddingSpec:
    """Returns how a configuration's model embeds.

    Raises:
      ConfigError: the pattern or the pooling is unknown.
    """
    try:
        return EmbeddingSpec(attention=config.model.attention, pooling=config.model.pooling)
    except ValueError as error:
        raise ConfigError(f"config.model.{error}") from None


def make_batches(config: Config, trainer: Trainer) -> Batches:
    """Returns the batches of a configuration.

    Raises:
      PreparedDataError: data is missing or does not fit; the message names it.
    """
    data = config.data

    def sampler(kind: str, group_size: int) -> Sampler:
        datasets = load_mixture(data.folder, data[kind], "train", kind, kind)
        _check_vocabulary(datasets, trainer.model_config)
        make = SingleDatasetSampler if data[f"{kind}_batches"] == "homogeneous" else MixedSampler
        seed = stable_seed(config.seed, kind)
        return make(datasets, data[f"{kind}_batch_size"], group_size, seed)

    group_sizes = {"embedding": data.group_size, "generative": 0}
    # Each chunk of a step has an even share of the rows of every data shard.
    chunks = config.grad_cache_chunks
    held = [shard * chunks + c for shard in local_shards(trainer.mesh) for c in range(chunks)]
    batches = Batches(
        {k: sampler(k, size) for k, size in group_sizes.items() if config.mode in ("unified", k)},
        row_limits(config, trainer.mesh),
        held,
        data.duplicate_positives_are_negatives,
    )
    _check_tokenizers(batches.datasets)
    return batches


def make_held_out(config: Config, trainer: Trainer) -> HeldOut | None:
    """Returns the held-out data of a configuration, None if it evaluates nothing.

    Raises:
      PreparedDataError: data is missing or does not fit; the message names it.
      ConfigError: the best checkpoint is to be kept by what is not measured on them.
    """
    if not config.evaluation.enabled:
        return None

    def datasets(kind: str, mixture: str) -> list[PreparedDataset]:
        if config.mode not in ("unified", kind):
            return []
        return list(load_mixture(config.data.folder, mixture, "held_out", kind, kind))

    held_out = HeldOut(
        trainer,
        {kind: datasets(kind, config.data[kind]) for kind in TEXT_KINDS},
        row_lengths(config),
        config.evaluation.batch_size,
        embedding_spec(config),
    )
    best = config.checkpoint.best_metric
    if best and best not in held_out.names:
        raise ConfigError(
            f"config.checkpoint.best_metric={best!r} must be one of {', '.join(held_out.names)}"
        )
    return held_out


def make_schedule(config: Config) -> optax.Schedule:
    """Returns the learning rate by step.

    Raises:
      ConfigError: the schedule is unknown.
    """
    optimizer = config.optimizer
    try:
        return learning_rate_schedule(
            optimizer.learning_rate, optimizer.warmup_ratio, config.steps, optimizer.schedule
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def row_lengths(config: Config) -> dict[str, int]:
    """Returns the longest that rows of "query", "passage" and "chat" may be, in tokens."""
    return {stream: config.data[f"{stream}_row_length"] for stream in STREAMS}


def row_limits(config: Config, mesh: Mesh) -> RowLimits:
    """Returns what the rows of a run may be: every chunk of a step has as many on every shard."""
    return RowLimits(
        longest=row_lengths(config),
        length_multiple=config.data.row_length_multiple,
        count_multiple=batch_shards(mesh) * config.grad_cache_chunks,
    )


def cross_process_settings(
    config: Config, batches: Batches, pretrained: Model | None
) -> dict[str, Any]:
    """Returns what must be alike in all processes of a run, by names fit for a message."""
    fields: dict[str, Any] = flatten_dict(  # pyright: ignore[reportAssignmentType]
        config.to_dict(), sep=".", is_leaf=lambda path, _: path == ("model", "sizes")
    )
    # A host may have its copies of data and weights in another place, but for those in a bucket.
    fields["data.folder"] = batches.description
    if pretrained is not None and not in_bucket(pretrained.folder):
        fields["model.weights"] = pretrained.fingerprint()
    return {f"config.{name}": value for name, value in fields.items()}


def _check_vocabulary(datasets: Datasets, model: ModelConfig) -> None:
    for dataset in datasets:
        pieces = dataset.manifest.tokenizer["vocab_size"]
        if pieces > model.vocab_size:
            raise PreparedDataError(
                f"{dataset.folder} was made with a tokenizer of {pieces} pieces, "
                f"but config.model.sizes.vocab_size={model.vocab_size}"
            )


def _check_tokenizers(datasets: Sequence[PreparedDataset]) -> None:
    first, *others = datasets
    for other in others:
        if other.manifest.tokenizer["sha256"] != first.manifest.tokenizer["sha256"]:
            raise PreparedDataError(
                f"{first.folder} and {other.folder} were made with different tokenizers: prepare "
                "them again with the same --tokenizer"
            )


def check_tokenizer(batches: Batches, pretrained: Model | None) -> None:
    """Checks that the data's tokens are those of the tokenizer that lies beside given weights.

    Where there is none, or one that cannot be read here, nothing is compared.

    Raises:
      PreparedDataError: the two make other tokens of the same text.
    """
    if pretrained is None:
        return
    try:
        path = tokenizer_in(pretrained.tokenizer_folder)
        own = find_tokenizer(pretrained, path) if path else None
        used = load_saved_tokenizer(batches.datasets[0])
    except (ConversionError, FileNotFoundError, TokenizerError):
        return
    if own is not None and own.encode(SAMPLE_TEXT) != used.encode(SAMPLE_TEXT):
        raise PreparedDataError(
            f"{batches.datasets[0].folder} was prepared with another tokenizer than {path}, which "
            f"the weights were trained with: prepare it again with --tokenizer {path}"
        )


def check_attention(trainer: Trainer, batches: Batches, held_out: HeldOut | None) -> None:
    """Checks that the implementation of attention serves all rows of a run: it traces programs.

    Raises:
      ConfigError: it does not; the message names the case.
    """
    if trainer.model_config.attention_implementation == "auto":
        return  # It serves all, and tracing takes seconds.
    try:
        with jax.set_mesh(trainer.mesh):
            for shape in batches.shapes:
                jax.eval_shape(trainer.step, trainer.abstract_state(), batches.empty(shape))
            if held_out is not None:
                held_out.trace()
    except AttentionError as error:
        raise ConfigError(str(error)) from None
