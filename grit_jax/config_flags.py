"""The command line of training: --config FILE, --workdir DIR, --config.FIELD=VALUE."""

from collections.abc import Mapping, Sequence
from pathlib import Path
import re
import runpy
from typing import Any, get_args, get_type_hints

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from grit_jax.config import Config, ConfigError, check_not_renamed, parse_config
from grit_jax.fields import check_known
from grit_jax.models import ARCHITECTURES, ModelConfig


def parse_flags(argv: Sequence[str]) -> tuple[Config, str]:
    """Returns the configuration and the working directory.

    The default working directory is `runs/NAME` for a configuration file NAME.py.

    Raises:
      ConfigError: a flag, the file or a field is wrong; the message names it.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "configuration file", flag_values=values)
    flags.DEFINE_string("workdir", None, "working directory", flag_values=values)
    flags.DEFINE_string("config.model.architecture", None, "", flag_values=values)
    overrides = _parse(values, argv, known_only=True)
    if not values["config"].value:
        raise ConfigError("--config=FILE is missing (see the folder configs)")
    path = Path(values["config"].value)
    config = _load(path)
    if architecture := values["config.model.architecture"].value:
        config.model.architecture = architecture
    _complete_sizes(config)
    _override(config, overrides)
    return parse_config(config), values["workdir"].value or f"runs/{path.stem}"


def _parse(values: flags.FlagValues, argv: Sequence[str], *, known_only: bool) -> list[str]:
    """Parses flags and returns the other arguments."""
    values.set_gnu_getopt()  # Flags may follow other arguments.
    try:
        return values(["train", *argv], known_only=known_only)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(_one_line(error)) from None


def _load(path: Path) -> Any:
    # Not by `config_flags.DEFINE_config_file`, whose errors are tracebacks.
    if not path.is_file():
        raise ConfigError(f"--config={path}: there is no such file")
    namespace = runpy.run_path(str(path))
    if "get_config" not in namespace:
        raise ConfigError(f"--config={path}: it has no function get_config()")
    try:
        config = namespace["get_config"]()
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"--config={path}: {_one_line(error)}") from None
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={path}: its get_config() must return a ConfigDict")
    parse_config(config)
    return config


def _complete_sizes(config: Any) -> None:
    """Adds the architecture's default sizes, so that the command line can override each of them."""
    if config.model.architecture not in ARCHITECTURES:
        return  # `make_config` raises the error.
    with config.unlocked():
        for name, default in ARCHITECTURES[config.model.architecture].sizes.items():
            if name not in config.model.sizes:
                config.model.sizes[name] = _placeholder(name) if default is None else default


def _placeholder(name: str) -> Any:
    """Returns a value of ConfigDict that stands for None, of the type that a flag converts to."""
    wanted = get_args(get_type_hints(ModelConfig)[name])[0]  # int of int | None.
    return placeholder(wanted if wanted in (int, float, tuple) else int)


def _override(config: ConfigDict, argv: Sequence[str]) -> None:
    """Sets fields from arguments --config.FIELD=VALUE, each converted to the field's type."""
    for argument in argv:
        if match := re.match(r"--?(?:no)?(config\.[^=]*)", argument):
            _check_name(match[1], config.to_dict())
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["train", *argv])
    if rest := _parse(values, argv, known_only=False):
        raise ConfigError(f"unknown argument {rest[0]!r}: set fields with --config.FIELD=VALUE")


def _check_name(name: str, config: Mapping[str, Any]) -> None:
    check_not_renamed(name)
    section, path = config, "config"
    for field in name.split(".")[1:]:
        path = f"{path}.{field}"
        try:
            check_known(path, section if isinstance(section, Mapping) else ())
        except ValueError as error:
            raise ConfigError(str(error)) from None
        section = section[field]


def _one_line(error: Exception) -> str:
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]  # The cause, in an error that only wraps it.
    return " ".join(str(error.args[0] if error.args else error).split())
