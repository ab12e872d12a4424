"""Makes the parts of a training run from its configuration.

Mistakes in the configuration or the data raise errors here, before anything is compiled.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict
import jax
from jax.sharding import Mesh
import numpy as np
import optax

from grit_jax.bucket import in_bucket
from grit_jax.config import AUTO, Config, ConfigError
from grit_jax.conversion import ConversionError, StoredModel, open_model
from grit_jax.conversion.adapted_model import AdaptedModel
from grit_jax.conversion.stored_tokenizer import may_have_mistrals
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
    ARCHITECTURES,
    AttentionError,
    LoraConfig,
    ModelConfig,
    lora_layers,
    make_config,
)
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.processes import broadcast_from_primary
from grit_jax.sharding import batch_shards, local_shards, make_mesh
from grit_jax.text.kinds import TEXT_KINDS
from grit_jax.text.templates import BASE, GRIT, embedding_prefix
from grit_jax.text.tokenizer import Tokenizer, TokenizerError
from grit_jax.text.tokenizer_files import CHAT_TEMPLATE, MISTRAL
from grit_jax.training.checkpoints import Checkpoints
from grit_jax.training.joint_loss import make_joint_loss
from grit_jax.training.optimizer import learning_rate_schedule, make_optimizer
from grit_jax.training.train_step import Trainer

# Two tokenizers are taken for the same if they encode this text to the same tokens.
SAMPLE_TEXT = "What 3 words mean, in 2026: na\u00efve, \u0441\u043b\u043e\u0432\u043e, \u8a9e."


def open_pretrained(config: Config) -> StoredModel | None:
    """Opens the weights to start from; returns None to start from random weights.

    Raises:
      ConfigError: there is no model, or it has another architecture.
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
            f"config.model.architecture={config.model.architecture!r}, but the architecture of "
            f"{config.model.weights} is {architecture!r}"
        )
    return pretrained


def make_trainer(
    config: Config,
    pretrained: StoredModel | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Trainer:
    """Returns the trainer.

    Args:
      config: the configuration.
      pretrained: the model to start from.
      devices: devices of the mesh, by default all devices.

    Raises:
      ConfigError, MeshError: the message names the field.
    """
    optimizer = config.optimizer
    return Trainer(
        model_config(config, pretrained),
        make_joint_loss(config.loss),
        make_optimizer(
            make_schedule(config),
            beta1=optimizer.beta1,
            beta2=optimizer.beta2,
            epsilon=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
            embedding_lr_multiplier=optimizer.embedding_lr_multiplier,
            mu_dtype=optimizer.mu_dtype,
        ),
        make_mesh(**dataclasses.asdict(config.mesh), devices=devices),
        config.grad_cache_chunks,
    )


def make_schedule(config: Config) -> optax.Schedule:
    """Returns the learning rate as a function of the step."""
    optimizer = config.optimizer
    return learning_rate_schedule(
        optimizer.learning_rate, optimizer.warmup_ratio, config.steps, optimizer.schedule
    )


def model_config(config: Config, pretrained: StoredModel | None = None) -> ModelConfig:
    """Returns the model's configuration, with the sizes of the model to start from.

    Raises:
      ConfigError: a size is unknown, impossible, or not that of `pretrained`.
    """
    model = config.model
    settings: dict[str, Any] = {
        "dtype": model.dtype,
        "param_dtype": model.param_dtype,
        "logits_dtype": model.logits_dtype,
        "remat": model.remat,
        "attention_implementation": model.attention_implementation,
        "splash_block_size": model.splash_block_size,
    }
    if model.embedding_projection_size:
        settings["embedding_projection_size"] = model.embedding_projection_size
    if model.architecture in ARCHITECTURES:
        unknown = model.sizes.keys() - ARCHITECTURES[model.architecture].sizes.keys()
        if unknown:
            raise ConfigError(
                f"config.model.sizes: a {model.architecture} has no {', '.join(sorted(unknown))}"
            )
    try:
        settings["lora"] = _lora_config(config, pretrained)
        if pretrained is None:
            return make_config(model.architecture, **model.sizes, **settings)
        _check_sizes(config, pretrained)
        if config.mode != "embedding" and not pretrained.config.has_lm_head:
            raise ConfigError(
                f"config.mode={config.mode!r} needs a language model head, which "
                f"{config.model.weights} lacks: set config.mode='embedding', or add the head of "
                "its base model (grit-jax convert from-hf FOLDER CHECKPOINT --head BASE)"
            )
        adapted = dataclasses.replace(pretrained.config, **settings)
        lora_layers(adapted)  # Raises if a pattern of config.lora.targets matches no layer.
        return adapted
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _lora_config(config: Config, pretrained: StoredModel | None) -> LoraConfig | None:
    """Returns the configuration of LoRA, None to train all parameters."""
    if not config.lora.rank:
        if config.lora.adapter:
            raise ConfigError(
                f"config.lora.adapter={config.lora.adapter!r} needs config.lora.rank, alpha and "
                "targets, those of the adapter"
            )
        return None
    if pretrained is None and not config.model.weights:
        # Random weights would have to be saved with each checkpoint, and are not worth keeping.
        raise ConfigError(
            f"config.lora.rank={config.lora.rank} needs config.model.weights: LoRA neither trains "
            "nor saves the weights that its updates are added to"
        )
    if pretrained is not None and in_bucket(pretrained.folder):
        raise ConfigError(
            f"config.lora.rank={config.lora.rank} needs config.model.weights on a local disk of "
            f"each host, not {pretrained.folder}: copy them with gcloud storage cp -r"
        )
    lora = config.lora
    return LoraConfig(rank=lora.rank, alpha=lora.alpha, targets=lora.targets)


def open_adapter(config: Config, trainer: Trainer, base: StoredModel) -> AdaptedModel:
    """Opens the adapter that a new run with LoRA starts from.

    Args:
      config: the configuration, with a `config.lora.adapter`.
      trainer: the trainer.
      base: the model that `config.model.weights` names.

    Raises:
      ConfigError: there is no adapter, or the settings of LoRA are not those of the adapter.
    """
    name, lora = config.lora.adapter, trainer.model_config.lora
    assert lora is not None
    try:
        adapter = open_model(name, base=base.folder)
    except (ConversionError, OSError) as error:
        raise ConfigError(f"config.lora.adapter: {error}") from None
    assert isinstance(adapter, AdaptedModel)  # Others refuse `base`.
    if adapter.stored_whole:
        whole = ", ".join(".".join(path) for path in adapter.stored_whole)
        raise ConfigError(
            f"config.lora.adapter={name!r} also has whole parameters ({whole}), which LoRA does "
            "not train: to train on top of the merged model, set config.model.weights to it"
        )
    adapted = [p for p in adapter.parameters if p.path in adapter.adapted]
    ranks = set().union(*(adapter.ranks(parameter) for parameter in adapted))
    scales = {adapter.update(parameter).scale for parameter in adapted}
    if len(ranks) > 1 or len(scales) > 1:
        raise ConfigError(
            f"config.lora.adapter={name!r} has several ranks or scales, or leaves out layers "
            "(rank_pattern, alpha_pattern, layers_to_transform): to train on top of the merged "
            "model, set config.model.weights to it"
        )
    (rank,), (scale,) = ranks, scales
    layers = [".".join(parameter.path[1:]) for parameter in adapted]
    same_layers = set(layers) == set(lora_layers(trainer.model_config))
    if rank != lora.rank or not same_layers or not math.isclose(scale, lora.alpha / lora.rank):
        raise ConfigError(
            f"config.lora.adapter={name!r} has other settings: set config.lora.rank={rank}, "
            f"config.lora.alpha={scale * rank:.10g} and "
            f"config.lora.targets={','.join(layers)}"
        )
    return adapter


def _check_sizes(config: Config, pretrained: StoredModel) -> None:
    """Checks that the configuration sets no size to another value than the pretrained model's.

    A size at the architecture's default counts as not set, since the command line fills it in.
    """
    defaults = ARCHITECTURES[config.model.architecture].sizes
    for name, size in config.model.sizes.items():
        stored = getattr(pretrained.config, name)
        if size not in (stored, defaults[name]):
            raise ConfigError(
                f"config.model.sizes.{name}={size!r}, but {pretrained.folder} has {stored!r}: with "
                "config.model.weights, leave sizes out, also in the --config file (as "
                "configs/gritlm_7b.py does)"
            )
    projection = config.model.embedding_projection_size
    stored = pretrained.config.embedding_projection_size
    if projection and stored not in (None, projection):
        raise ConfigError(
            f"config.model.embedding_projection_size={projection}, but {pretrained.folder} has a "
            f"projection to {stored}: leave it at 0 to keep that"
        )


def make_batches(config: Config, trainer: Trainer) -> Batches:
    """Returns the batches.

    Raises:
      PreparedDataError: data is missing or does not fit; the message names it.
    """
    data = config.data

    def sampler(kind: str, group_size: int) -> Sampler:
        datasets = load_mixture(data.folder, getattr(data, kind), "train", kind, kind)
        is_homogeneous = getattr(data, f"{kind}_batches") == "homogeneous"
        make = SingleDatasetSampler if is_homogeneous else MixedSampler
        batch_size, seed = getattr(data, f"{kind}_batch_size"), stable_seed(config.seed, kind)
        return make(datasets, batch_size, group_size, seed)

    group_sizes = {"embedding": data.group_size, "generative": 0}
    # Each GradCache chunk has the same share of the rows of every data shard.
    chunks = config.grad_cache_chunks
    shards = [shard * chunks + c for shard in local_shards(trainer.mesh) for c in range(chunks)]
    batches = Batches(
        {k: sampler(k, size) for k, size in group_sizes.items() if config.mode in ("unified", k)},
        row_limits(config, trainer.mesh),
        shards,
        data.duplicate_positives_are_negatives,
        data.same_query_positives_are_negatives,
    )
    _check_datasets(batches.datasets, trainer.model_config)
    for each in batches.samplers.values():
        _check_templates(each.datasets, data.template)
    return batches


def _check_datasets(datasets: Sequence[PreparedDataset], model: ModelConfig) -> None:
    """Checks that datasets were prepared with one tokenizer, which fits the model's vocabulary."""
    first = datasets[0]
    for dataset in datasets:
        tokenizer = dataset.manifest.tokenizer
        if tokenizer["vocab_size"] > model.vocab_size:
            raise PreparedDataError(
                f"{dataset.folder} was prepared with a tokenizer of {tokenizer['vocab_size']} "
                f"tokens, but config.model.sizes.vocab_size={model.vocab_size}"
            )
        if tokenizer["sha256"] != first.manifest.tokenizer["sha256"]:
            raise PreparedDataError(
                f"{first.folder} and {dataset.folder} were prepared with different tokenizers: "
                "prepare them again with the same --tokenizer"
            )


def _check_templates(datasets: Sequence[PreparedDataset], template: str) -> None:
    """Checks that datasets of one kind have one template, for chats the configured one."""
    first = datasets[0]
    for dataset in datasets:
        if _templates(dataset) != _templates(first):
            raise PreparedDataError(
                f"{first.folder} and {dataset.folder} were prepared with different templates: "
                "prepare them again with the same --template and --embedding-template"
            )
    own = BASE if first.manifest.options.get("chat_template") else GRIT
    if first.manifest.kind == "generative" and template not in (AUTO, own):
        raise PreparedDataError(
            f"config.data.template={template!r}, but {first.folder} was prepared with --template "
            f"{own}: prepare it again with --template {template}, or set config.data.template="
            f"{own!r}"
        )


def _templates(dataset: PreparedDataset) -> tuple[str, str]:
    """Returns the templates of a dataset's chats and of its texts to embed."""
    options = dataset.manifest.options
    if dataset.manifest.kind == "generative":
        return options.get("chat_template", ""), ""
    return "", options.get("embedding_template", GRIT)


def row_limits(config: Config, mesh: Mesh) -> RowLimits:
    """Returns the limits on rows. Every GradCache chunk has as many rows on every data shard."""
    return RowLimits(
        longest=config.data.row_lengths,
        length_multiple=config.data.row_length_multiple,
        count_multiple=batch_shards(mesh) * config.grad_cache_chunks,
    )


def make_held_out(config: Config, trainer: Trainer) -> HeldOut | None:
    """Returns the held-out data, None if evaluation is disabled.

    Raises:
      PreparedDataError: data is missing or does not fit; the message names it.
      ConfigError: `config.checkpoint.best_metric` is not a metric of this data.
    """
    if not config.evaluation.enabled:
        return None

    def datasets(kind: str, mixture: str) -> list[PreparedDataset]:
        if config.mode not in ("unified", kind):
            return []
        return list(load_mixture(config.data.folder, mixture, "held_out", kind, kind))

    held_out = HeldOut(
        trainer,
        {kind: datasets(kind, getattr(config.data, kind)) for kind in TEXT_KINDS},
        config.data.row_lengths,
        config.evaluation.batch_size,
        config.loss.embedding,
    )
    best = config.checkpoint.best_metric
    if best and best not in held_out.metric_names:
        names = ", ".join(held_out.metric_names)
        raise ConfigError(f"config.checkpoint.best_metric={best!r} must be one of {names}")
    return held_out


def make_checkpoints(
    config: Config,
    trainer: Trainer,
    batches: Batches,
    folder: epath.Path,
    pretrained: StoredModel | None = None,
) -> Checkpoints:
    """Returns the checkpoints of the run, which refuse to continue a run on other data.

    A run with LoRA is continued only with the weights that it started from, whose folder may have
    moved. Each checkpoint stores how the model embeds and the tokenizer of the data.

    Raises:
      CheckpointError: the folder cannot be written to.
      PreparedDataError: a file of the tokenizer is missing.
    """
    description: dict[str, Any] = {
        "data": {"seed": config.seed, **batches.description},
        "trained": {
            "param_dtype": config.model.param_dtype,
            "mu_dtype": config.optimizer.mu_dtype,
            "learn_temperature": config.loss.learn_temperature,
        },
    }
    base_folder = None
    if trainer.model_config.lora is not None and pretrained is not None:
        lora = dataclasses.asdict(trainer.model_config.lora)
        description["lora"] = {**lora, "base": pretrained.weights_fingerprint()}
        base_folder = str(pretrained.folder.resolve())
    dataset = batches.datasets[0]
    tokenizer = saved_tokenizer_files(dataset)
    if tokenizer and (template := _chat_template(config, batches, pretrained)):
        tokenizer[CHAT_TEMPLATE] = template.encode()
    special_tokens = dataset.manifest.tokenizer
    return Checkpoints(
        folder,
        trainer.model_config,
        description,
        config.checkpoint.every_steps,
        config.checkpoint,
        base_folder,
        usage={
            **make_embedding_spec(config, batches, pretrained)[0].to_fields(),
            "bos_token_id": special_tokens.get("bos_id", 1),
            "eos_token_id": special_tokens.get("eos_id", 2),
        },
        tokenizer=tokenizer if broadcast_from_primary(bool(tokenizer)) else None,
    )


def _chat_template(config: Config, batches: Batches, pretrained: StoredModel | None) -> str:
    """Returns the chat template of the trained model; without chats, that of its weights."""
    if "generative" in batches.samplers:
        return _templates(batches.samplers["generative"].datasets[0])[0]
    if config.data.template == GRIT or pretrained is None or not pretrained.tokenizer_files:
        return ""
    return Tokenizer.of_files(pretrained.tokenizer_files).chat_template


def make_embedding_spec(
    config: Config, batches: Batches, pretrained: StoredModel | None = None
) -> tuple[EmbeddingSpec, str]:
    """Returns how the trained model embeds, and a line that says with which default instructions.

    Without embedding examples, prompts and template are those of the model to start from.
    """
    spec = config.loss.embedding
    if "embedding" not in batches.samplers:
        start = EmbeddingSpec.from_fields(pretrained.fields if pretrained else {})
        kept = ("query_prompt", "document_prompt", "template")
        prompts = {name: getattr(start, name) for name in kept}
        return dataclasses.replace(spec, **prompts), ""
    datasets = batches.samplers["embedding"].datasets
    query, of_query = _instruction(config.data.query_instruction, datasets, "query")
    document, of_document = _instruction(config.data.document_instruction, datasets, "passage")
    template = _templates(datasets[0])[1]
    spec = dataclasses.replace(
        spec,
        query_prompt=embedding_prefix(query, template),
        document_prompt=embedding_prefix(document, template),
        template=template,
    )
    return spec, f"by default, queries are embedded {of_query}; documents {of_document}"


def _instruction(
    configured: str, datasets: Sequence[PreparedDataset], stream: str
) -> tuple[str, str]:
    """Returns the default instruction of a stream, and the words that say what it is."""
    if configured != AUTO:
        return configured, f"with {configured!r}" if configured else "without an instruction"
    described = [dataset.manifest.instructions.get(stream) for dataset in datasets]
    known = [instructions for instructions in described if instructions is not None]
    if len(known) < len(described):
        return "", "without an instruction (that of data prepared by earlier versions is unknown)"
    different = {text for instructions in known for text in instructions["first"]}
    count = max(len(different), *(instructions["count"] for instructions in known))
    if count > 1:
        field = "query_instruction" if stream == "query" else "document_instruction"
        return "", (
            f"without an instruction (training has {count}; choose one with config.data.{field})"
        )
    (instruction,) = different
    return instruction, f"with {instruction!r}" if instruction else "without an instruction"


def describe_new_masking(config: Config, batches: Batches, stored: Mapping[str, Any]) -> str | None:
    """Returns what changes for a continued run of a version that did not mask by query, or None.

    Args:
      config: the configuration.
      batches: the batches.
      stored: the content of the run's config.json.
    """
    field = "same_query_positives_are_negatives"
    if field in stored.get("data", {}) or config.data.same_query_positives_are_negatives:
        return None
    sampler = batches.samplers.get("embedding")
    lengths = [dataset.lengths for dataset in sampler.datasets] if sampler else []
    queries = [each.fingerprints[each.first[:-1]] for each in lengths]
    if not queries or len(np.unique(all_queries := np.concatenate(queries))) == len(all_queries):
        return None
    return (
        "some queries stand in several lines: the positives of the other lines are no longer "
        f"negatives; --config.data.{field}=True continues the run as before"
    )


def cross_process_settings(
    config: Config, batches: Batches, pretrained: StoredModel | None
) -> dict[str, Any]:
    """Returns the settings that every process must agree on, keyed by names for error messages."""
    settings: dict[str, Any] = flatten_dict(  # pyright: ignore[reportAssignmentType]
        config.to_dict(), sep=".", is_leaf=lambda path, _: path == ("model", "sizes")
    )
    # Hosts may have local copies of data and weights in different folders.
    settings["data.folder"] = batches.description
    if pretrained is not None and not in_bucket(pretrained.folder):
        settings["model.weights"] = pretrained.weights_fingerprint()
    return {f"config.{name}": value for name, value in settings.items()}


def check_tokenizer(batches: Batches, pretrained: StoredModel | None) -> None:
    """Checks that the data was prepared with the tokenizer of the weights to start from.

    If the weights come without a tokenizer, or it cannot be loaded, only the default of `prepare`
    is checked: Mistral's tokenizer is refused for other models.

    Raises:
      PreparedDataError: the two tokenizers encode a sample text differently.
    """
    if pretrained is None:
        return
    dataset = batches.datasets[0]
    try:
        own = Tokenizer.of_files(pretrained.tokenizer_files) if pretrained.tokenizer_files else None
        used = load_saved_tokenizer(dataset)
    except (ConversionError, FileNotFoundError, TokenizerError):
        return
    if own is None:
        if dataset.manifest.tokenizer["name"] == MISTRAL and not may_have_mistrals(pretrained):
            raise PreparedDataError(
                f"{dataset.folder} was prepared with Mistral's tokenizer, the default, but the "
                f"weights in {pretrained.folder} are of another model and have no tokenizer: copy "
                "theirs into that folder, and prepare the data again with --tokenizer "
                f"{pretrained.folder}"
            )
    elif own.encode(SAMPLE_TEXT) != used.encode(SAMPLE_TEXT):
        raise PreparedDataError(
            f"{dataset.folder} was prepared with another tokenizer than that of "
            f"{pretrained.folder}, config.model.weights: prepare it again with --tokenizer "
            f"{pretrained.folder}"
        )


def check_attention(trainer: Trainer, batches: Batches, held_out: HeldOut | None) -> None:
    """Checks by tracing that the attention implementation supports all rows of the run.

    Raises:
      ConfigError: it does not; the message names the case.
    """
    if trainer.model_config.attention_implementation == "auto":
        return  # It supports all rows, and tracing takes seconds.
    try:
        with jax.set_mesh(trainer.mesh):
            for shape in batches.shapes:
                jax.eval_shape(trainer.step, trainer.abstract_state(), batches.empty(shape))
            if held_out is not None:
                held_out.trace()
    except AttentionError as error:
        raise ConfigError(str(error)) from None
