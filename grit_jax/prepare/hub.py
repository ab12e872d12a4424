"""Datasets and tokenizers on the Hugging Face Hub, downloaded into its cache."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
import re
from typing import Any

from grit_jax.prepare.data_file import SUFFIXES
from grit_jax.prepare.joined import CORPUS_METADATA, DATASET_METADATA
from grit_jax.text.compression import COMPRESSION_SUFFIXES
from grit_jax.text.jsonl import SourceError

PREFIX = "hf:"
# OWNER/NAME or OWNER/NAME/CONFIG
NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w./-]+))?")
MODEL = re.compile(r"[\w.-]+/[\w.-]+")
CARD = "README.md"
TOKENIZER_FILES = ("tokenizer*", "*.model", "special_tokens_map.json", "config.json", "*.jinja")


def download_dataset(source: str) -> tuple[Path, list[str]]:
    """Downloads a dataset, and returns its folder and the patterns of its files.

    Args:
      source: hf:OWNER/NAME, or hf:OWNER/NAME/CONFIG for one configuration of it.

    Returns:
      The folder, and patterns of the paths in it that belong to the configuration.

    Raises:
      SourceError: the name is wrong, or the dataset cannot be downloaded or has no such
        configuration.
    """
    match = NAME.fullmatch(source.removeprefix(PREFIX))
    if match is None:
        raise SourceError(f"{source!r} is not hf:OWNER/NAME or hf:OWNER/NAME/CONFIG")
    repository, config = match["repository"], match["config"]
    if config is None:
        patterns = [f"*{end}{packed}" for end in SUFFIXES for packed in ("", *COMPRESSION_SUFFIXES)]
    else:
        card = _download(repository, [CARD]) / CARD
        patterns = _training_files(card, config, source)
    metadata = [f"*{name}" for name in (CORPUS_METADATA, DATASET_METADATA)]
    return _download(repository, [*patterns, *metadata]), patterns


def _training_files(card: Path, config: str, source: str) -> list[str]:
    """Returns the patterns of a configuration's files for training, by the dataset's card."""
    configs = _configs(card)
    if config in configs:
        return configs[config]
    paths = [path for patterns in configs.values() for path in patterns]
    if configs and not any(path.startswith(f"{config}/") for path in paths):
        raise SourceError(f"{source}: there is no such configuration, only {', '.join(configs)}")
    return [f"{config}/*"]


def _configs(card: Path) -> dict[str, list[str]]:
    if not card.exists():
        return {}
    from huggingface_hub.repocard import metadata_load

    configs: list[dict[str, Any]] = (metadata_load(card) or {}).get("configs") or []
    return {each["config_name"]: _patterns(each.get("data_files") or []) for each in configs}


def _patterns(data_files: Any) -> list[str]:
    """Returns patterns from `PATTERN`, `[PATTERN, ...]` or `[{"split", "path"}, ...]`."""
    listed = data_files if isinstance(data_files, list) else [data_files]
    patterns = []
    for each in listed:
        path = each
        if isinstance(each, dict):
            if each.get("split") != "train":
                continue
            path = each["path"]
        patterns += path if isinstance(path, list) else [path]
    return patterns


def is_of(path: str, patterns: Sequence[str]) -> bool:
    """Returns whether a path in a dataset's folder matches one of its patterns."""
    return any(fnmatch(path, pattern.replace("**/", "*")) for pattern in patterns)


def download_tokenizer(name: str) -> Path:
    """Downloads the tokenizer of a model OWNER/MODEL, and returns its folder.

    Raises:
      SourceError: it cannot be downloaded.
    """
    return _download(name, TOKENIZER_FILES, "model")


def _download(repository: str, patterns: Sequence[str], kind: str = "dataset") -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repository, repo_type=kind, allow_patterns=[*patterns])
    except Exception as error:  # The Hub and the network raise many types.
        raise SourceError(
            f"{repository} cannot be downloaded from the Hugging Face Hub: "
            f"{' '.join(str(error).split())}"
        ) from None
    return Path(folder)
