"""Every field of a configuration, with its default: the hyperparameters of GritLM 7B.

A file in `configs/` starts from `default_config()` and changes what differs. An experiment is that
file; `--config.x.y=z` on the command line overrides any field.
"""

from collections.abc import Mapping
import difflib
import math
from typing import Any

from ml_collections import ConfigDict

# A ConfigDict, whose fields no type checker knows.
Config = Any

# Sizes of a model that is not trained: weights in int8.
NOT_TRAINED_WITH = ("linear_dtype",)

# The least that a field may be, by its section and name.
MINIMUMS = {
    ("", "steps"): 1,
    ("", "log_every_steps"): 1,
    ("", "watchdog_timeout_seconds"): 0,
    ("", "grad_cache_chunks"): 1,
    ("loss", "embedding_weight"): 0,
    ("loss", "generative_weight"): 0,
    ("optimizer", "learning_rate"): 0,
    ("optimizer", "weight_decay"): 0,
    ("optimizer", "max_consecutive_skips"): 1,
    ("optimizer", "embedding_lr_multiplier"): 0,
    ("data", "embedding_batch_size"): 1,
    ("data", "generative_batch_size"): 1,
    ("data", "group_size"): 1,
    ("data", "row_length_multiple"): 1,
    ("data", "data_threads"): 1,
    ("checkpoint", "every_steps"): 1,
    ("checkpoint", "keep"): 1,
    ("checkpoint", "keep_every_steps"): 0,
    ("evaluation", "every_steps"): 0,
    ("evaluation", "batch_size"): 1,
    ("profile", "num_steps"): 0,
}


class ConfigError(ValueError):
    """A field of the configuration is unknown, of the wrong type, or impossible."""


def default_config() -> Config:
    """Returns a configuration with every field there is.

    The comments above and behind a field are what the documentation says of it
    (docs/configuration_page.py).
    """
    config: Config = ConfigDict()
    config.mode = "unified"  # Streams that are trained: "unified", "embedding" or "generative".
    config.steps = 1253  # Steps of the run.
    config.seed = 0  # Of random parameters, the order of the data, and what is drawn from it.
    config.log_every_steps = 10  # Steps between two that are shown and written to metrics.jsonl.
    # A process ends, to be started again, when no step follows for so long; 0: never.
    config.watchdog_timeout_seconds = 1800.0
    # Parts in which a step reads its batch, when memory needs it: the embedding texts are then read
    # a second time, for the gradient (GradCache, see training/grad_cache.py).
    config.grad_cache_chunks = 1

    config.model = ConfigDict()
    # Where the parameters start: a Hugging Face folder, a GGUF file, a checkpoint or a run's
    # folder; "" to start at random. Sizes are then the checkpoint's.
    config.model.weights = ""
    config.model.architecture = "mistral"  # "mistral" (a Llama, too) or "mixtral".
    # Sizes, by the names of Hugging Face's config.json; the architecture's own where left out.
    config.model.sizes = ConfigDict()
    config.model.dtype = "bfloat16"  # Of the computation: "bfloat16" or "float32".
    config.model.param_dtype = "float32"  # Of the parameters: "float32" or "bfloat16".
    # Of the logits: "float32", or "bfloat16", which halves their memory, at some loss.
    config.model.logits_dtype = "float32"
    # What a layer's backward pass finds saved: "none" computes no product again, "save_matmuls" and
    # "offload" (the same, in the host's memory) all but the products with weights, "full" all.
    config.model.remat = "full"
    # "splash" (TPU), "cudnn" (GPU), "xla", or "auto": "splash" on a TPU where it can serve, else
    # "xla".
    config.model.attention_implementation = "auto"
    # Positions in a block of the kernel for TPUs, at most; a row's own block divides the row.
    config.model.splash_block_size = 1024
    # Embedding instruction, embedding text, generation instruction, generation text: each
    # bidirectional or causal. "bbcc", "cbcc" or "cccc".
    config.model.attention = "bbcc"
    # Size of embeddings, where a linear layer is to make them of pooled hidden states; 0: none.
    config.model.embedding_projection_size = 0
    # How hidden states make an embedding: "mean", "weightedmean", "lasttoken" or "cls".
    config.model.pooling = "mean"

    # Low-rank updates of linear layers (LoRA): the updates are trained in the place of the model,
    # which stays as `config.model.weights` has it. They need a higher rate of learning, such as
    # 2e-4.
    config.lora = ConfigDict()
    config.lora.rank = 0  # Rank of the updates; 0: all parameters are trained.
    config.lora.alpha = 16.0  # The updates are multiplied by alpha / rank.
    # Names of the layers, with the wildcards of a shell; each must match some. These are all but
    # "feed_forward.router" of a Mixtral, which is smaller than its update would be.
    config.lora.targets = "attention.*,feed_forward.gate,feed_forward.up,feed_forward.down"

    config.loss = ConfigDict()
    config.loss.embedding_weight = 1.0  # Factor of the contrastive loss.
    config.loss.generative_weight = 1.0  # Factor of the next-token loss.
    config.loss.temperature = 0.02  # What the scores of the contrastive loss are divided by.
    config.loss.learn_temperature = False  # Whether it is learned, from that on.
    config.loss.is_symmetric = False  # Whether positives are to find their queries as well.
    # What the next-token loss is a mean of: "mixed", "token" or "mean" (objectives/next_token.py).
    config.loss.generative_reduction = "mixed"
    config.loss.generative_group_size = 32  # Chats in a group of "mixed": the original's device.

    # AdamW.
    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2e-5  # The highest learning rate.
    config.optimizer.schedule = "linear"  # Its decay to 0: "linear", "cosine", or "constant": none.
    config.optimizer.warmup_ratio = 0.03  # Share of the steps in which it grows linearly.
    config.optimizer.beta1 = 0.9  # Of the first moment.
    config.optimizer.beta2 = 0.999  # Of the second moment.
    config.optimizer.epsilon = 1e-8  # Added to the root of the second moment.
    config.optimizer.weight_decay = 0.0  # Of the model's parameters, times the learning rate.
    config.optimizer.max_grad_norm = 1.0  # Of the gradient of all parameters together, at most.
    # A step whose gradient is not finite is skipped; more than so many in a row end the run.
    config.optimizer.max_consecutive_skips = 10
    config.optimizer.mu_dtype = "float32"  # Of the first moment: "float32" or "bfloat16".
    # Learning rate of the token embeddings, in units of that of the rest.
    config.optimizer.embedding_lr_multiplier = 1.0

    config.data = ConfigDict()
    config.data.folder = "data/prepared"  # What grit-jax prepare wrote.
    config.data.embedding = "embedding"  # Mixture of embedding examples in that folder.
    config.data.generative = "chat"  # Mixture of chats in that folder.
    config.data.embedding_batch_size = 2048  # Queries a step, over all devices.
    config.data.generative_batch_size = 256  # Chats a step, over all devices.
    config.data.group_size = 2  # Passages a query: one positive, the rest negatives.
    # "homogeneous": one dataset a step, which makes harder negatives; "mixed": examples of all
    # datasets in every step.
    config.data.embedding_batches = "homogeneous"
    config.data.generative_batches = "mixed"  # Likewise, of chats: "homogeneous" or "mixed".
    # Copies of a query's positive among a step's passages are no negatives to it, unless this is
    # set, as it was in the original.
    config.data.duplicate_positives_are_negatives = False
    # Tokens of a row of queries, at most. Several texts share one; the longest must fit. Within
    # that, rows are as long as leaves the fewest places empty.
    config.data.query_row_length = 512
    config.data.passage_row_length = 2560  # Likewise, of passages.
    config.data.chat_row_length = 2560  # Likewise, of chats.
    # The length of a row is a multiple of this; the kernel for TPUs needs multiples of 128.
    config.data.row_length_multiple = 128
    config.data.data_threads = 2  # That read and pack the batches that come next.

    # Devices in each direction of the mesh; one may be -1: what the others leave.
    config.mesh = ConfigDict()
    config.mesh.slice = 1  # Slices of TPUs, joined by the network; each has whole weights.
    config.mesh.fsdp = -1  # Rows of texts and weights are split over these.
    config.mesh.tensor = 1  # Heads, feed-forward columns and vocabulary are split over these.
    config.mesh.expert = 1  # Rows of texts and a Mixtral's experts are split over these.

    config.checkpoint = ConfigDict()
    # Steps between two; one is saved after the first step and the last as well.
    config.checkpoint.every_steps = 250
    config.checkpoint.keep = 2  # How many of the newest are kept.
    config.checkpoint.keep_every_steps = 0  # Those of multiples of this are kept, too; 0: none.
    # The best is kept, too, by this measure, such as "perplexity" or "faq/ndcg_at_10"; "": none.
    config.checkpoint.best_metric = ""
    config.checkpoint.best_mode = "max"  # Whether the best has the "max" or the "min" of it.

    config.evaluation = ConfigDict()
    # Whether retrieval and perplexity are measured on held-out data, before and after training.
    config.evaluation.enabled = False
    config.evaluation.every_steps = 0  # And every so many steps in between; 0: not.
    config.evaluation.batch_size = 256  # Texts that are read together.

    # A trace of some steps, in the working directory's "profile".
    config.profile = ConfigDict()
    config.profile.first_step = 10  # The first that is recorded, from 2 on: step 1 compiles.
    config.profile.num_steps = 0  # Steps that are recorded; 0: none.
    return config


def check_fields(config: Mapping[str, Any]) -> None:
    """Checks that a configuration has the fields of the default one, each of its type.

    Args:
      config: the configuration as plain dictionaries (`ConfigDict.to_dict`).

    Raises:
      ConfigError: it does not; the message names the field.
    """
    _check_section(config, default_config().to_dict(), "config")
    choices = ("unified", "embedding", "generative")
    if config["mode"] not in choices:
        raise ConfigError(f"config.mode={config['mode']!r} must be one of {', '.join(choices)}")
    for name in ("embedding_batches", "generative_batches"):
        value = config["data"][name]
        if value not in ("homogeneous", "mixed"):
            raise ConfigError(f"config.data.{name}={value!r} must be one of homogeneous, mixed")
    _check_optimizer(config["optimizer"])
    _check_best(config)
    if config["profile"]["first_step"] < 2:
        raise ConfigError(
            f"config.profile.first_step={config['profile']['first_step']} must be at least 2: the "
            "first step compiles"
        )
    for (section, name), least in MINIMUMS.items():
        value = config[section][name] if section else config[name]
        if value < least:
            where = f"config.{section}.{name}" if section else f"config.{name}"
            raise ConfigError(f"{where}={value} must be at least {least}")


def _check_optimizer(optimizer: Mapping[str, Any]) -> None:
    for name in ("warmup_ratio", "beta1", "beta2"):
        if not 0 <= optimizer[name] < 1:
            raise ConfigError(
                f"config.optimizer.{name}={optimizer[name]} must be from 0 to below 1"
            )
    if optimizer["epsilon"] <= 0:
        raise ConfigError(
            f"config.optimizer.epsilon={optimizer['epsilon']} must be positive: what has no "
            "gradient is divided by it"
        )
    if optimizer["max_grad_norm"] <= 0:
        raise ConfigError(
            f"config.optimizer.max_grad_norm={optimizer['max_grad_norm']} must be positive; use a "
            "large value, such as 1e9, to disable clipping"
        )
    if optimizer["mu_dtype"] not in ("float32", "bfloat16"):
        raise ConfigError(
            f"config.optimizer.mu_dtype={optimizer['mu_dtype']!r} must be one of float32, bfloat16"
        )


def _check_best(config: Mapping[str, Any]) -> None:
    checkpoint, evaluation = config["checkpoint"], config["evaluation"]
    if checkpoint["best_mode"] not in ("max", "min"):
        raise ConfigError(
            f"config.checkpoint.best_mode={checkpoint['best_mode']!r} must be one of max, min"
        )
    every, saved = evaluation["every_steps"], checkpoint["every_steps"]
    is_measured = evaluation["enabled"] and every > 0 and saved % every == 0
    if checkpoint["best_metric"] and not is_measured:
        raise ConfigError(
            f"config.checkpoint.best_metric={checkpoint['best_metric']!r} needs every checkpoint "
            "measured: config.evaluation.enabled, and config.checkpoint.every_steps a multiple of "
            "config.evaluation.every_steps"
        )


def _check_section(section: Mapping[str, Any], expected: Mapping[str, Any], name: str) -> None:
    for key in section:
        if key not in expected:
            close = difflib.get_close_matches(key, expected, 1)
            hint = f"; did you mean {name}.{close[0]}?" if close else ""
            raise ConfigError(f"{name}.{key}: there is no such field{hint}")
    for key, default in expected.items():
        if key not in section:
            raise ConfigError(f"{name}.{key} is missing: start from default_config()")
        value, where = section[key], f"{name}.{key}"
        if where == "config.model.sizes":
            continue  # The model's own configuration knows its fields.
        if isinstance(default, Mapping):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where} must be a section, not {value!r}")
            _check_section(value, default, where)
        elif not _is_of_type(value, type(default)):
            raise ConfigError(f"{where}={value!r} must be of type {type(default).__name__}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}={value} must be a finite number")


def _is_of_type(value: Any, wanted: type) -> bool:
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is wanted
