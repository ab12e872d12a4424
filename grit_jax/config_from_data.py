"""Fills in the fields of a configuration that are taken from the prepared data."""

from collections.abc import Mapping
import dataclasses
import shlex

from etils import epath

from grit_jax.arithmetic import ceil_div, round_up
from grit_jax.bucket import in_bucket, open_bucket
from grit_jax.config import AUTO, Config, ConfigError, DataSection
from grit_jax.data.manifest import (
    Manifest,
    mixture_average_tokens,
    mixture_manifests,
    mixtures_by_kind,
)
from grit_jax.text.kinds import TEXT_KINDS

# Rows longer than the longest text can be filled better.
ROW_LENGTH_PER_LONGEST_TEXT = 1.25
MIN_ROW_LENGTH = 512


def complete_config(config: Config) -> Config:
    """Returns the configuration with all fields that are taken from the data.

    These are `config.mode`, `config.data.embedding` and `config.data.generative` if they are
    "auto", row lengths of 0, and `config.steps` if `config.epochs` is set.

    Raises:
      ConfigError: the data leave open which mixture is meant.
      PreparedDataError: the data are missing or damaged.
    """
    config = _with_mixtures(config)
    if not config.epochs and all(config.data.row_lengths.values()):
        return config
    kinds = [kind for kind in TEXT_KINDS if config.mode in ("unified", kind)]
    manifests = {
        kind: mixture_manifests(config.data.folder, getattr(config.data, kind), kind)
        for kind in kinds
    }
    config = dataclasses.replace(config, data=_with_row_lengths(config, manifests))
    if not config.epochs:
        return config
    examples = {
        kind: sum(manifest.count for manifest in splits.get("train", []))
        for kind, splits in manifests.items()
    }
    steps = max(
        ceil_div(round(config.epochs * count), getattr(config.data, f"{kind}_batch_size"))
        for kind, count in examples.items()
    )
    return dataclasses.replace(config, steps=max(1, steps))


def average_tokens(config: Config) -> dict[str, float]:
    """Returns the average tokens of a text of each stream that a run trains on.

    Streams whose data are in a bucket, are not prepared yet or do not record it are left out.

    Args:
      config: a completed configuration.

    Raises:
      PreparedDataError: the data are damaged.
    """
    folder, found = epath.Path(config.data.folder), {}
    for kind in TEXT_KINDS:
        mixture = getattr(config.data, kind)
        if config.mode not in ("unified", kind) or in_bucket(folder):
            continue
        if (folder / f"{mixture}.json").exists():
            found |= mixture_average_tokens(folder, mixture, kind)
    return found


def check_prepared(config: Config) -> None:
    """Checks that the folder has the mixtures of a run that names its sources.

    Raises:
      ConfigError: it does not; the message says how to prepare them.
    """
    if missing := missing_mixtures(config):
        command = shlex.join(["grit-jax", "prepare", *prepare_arguments(config)])
        raise ConfigError(
            f"config.data.folder={config.data.folder!r} lacks {' and '.join(missing)}: add "
            f"--prepare (with one process), or run {command}"
        )


def missing_mixtures(config: Config) -> list[str]:
    """Returns the mixtures that a run needs from `config.data.sources` and that are missing."""
    if not config.data.sources:
        return []
    kinds = [kind for kind in TEXT_KINDS if config.mode in (AUTO, "unified", kind)]
    names = {getattr(config.data, kind) for kind in kinds} - {AUTO}
    folder = config.data.folder
    folder = open_bucket(folder) if in_bucket(folder) else epath.Path(folder)
    return sorted(name for name in names if not (folder / f"{name}.json").exists())


def prepare_arguments(config: Config) -> list[str]:
    """Returns the arguments of `grit-jax prepare` that prepare `config.data.sources`."""
    tokenizer = ["--tokenizer", config.model.weights] if config.model.weights else []
    return [*config.data.sources.split(), *tokenizer, "--output", config.data.folder]


def _with_mixtures(config: Config) -> Config:
    names = {kind: getattr(config.data, kind) for kind in TEXT_KINDS}
    if AUTO not in (config.mode, *names.values()):
        return config
    found = mixtures_by_kind(config.data.folder)
    mode = config.mode
    if mode == AUTO:
        present = [kind for kind, name in names.items() if name != AUTO or kind in found]
        if not present:
            raise ConfigError(
                f"config.data.folder={config.data.folder!r} has no prepared data: make some with "
                f"grit-jax prepare FOLDER --output {config.data.folder}"
            )
        mode = "unified" if len(present) == len(names) else present[0]
    for kind, name in names.items():
        if name != AUTO or mode not in ("unified", kind):
            continue
        mixtures = found.get(kind, [])
        if len(mixtures) != 1:
            raise ConfigError(
                f"config.data.{kind}={AUTO!r}, but {config.data.folder} has "
                f"{len(mixtures)} mixtures of this kind: name one"
                f"{' of ' + ', '.join(mixtures) if mixtures else ', or set config.mode'}"
            )
        names[kind] = mixtures[0]
    return dataclasses.replace(config, mode=mode, data=dataclasses.replace(config.data, **names))


def _with_row_lengths(
    config: Config, manifests: Mapping[str, Mapping[str, list[Manifest]]]
) -> DataSection:
    data = config.data
    lengths = {}
    for splits in manifests.values():
        of_kind = [manifest for split in splits.values() for manifest in split]
        for stream in of_kind[0].longest:
            if not data.row_lengths[stream]:
                longest = max(manifest.longest[stream] for manifest in of_kind)
                rows = round_up(
                    int(ROW_LENGTH_PER_LONGEST_TEXT * longest), data.row_length_multiple
                )
                lengths[f"{stream}_row_length"] = max(MIN_ROW_LENGTH, rows)
    return dataclasses.replace(data, **lengths)
