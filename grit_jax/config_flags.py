"""The command line of training: --config FILE, --workdir DIR, --config.FIELD=VALUE."""

from collections.abc import Sequence
from pathlib import Path
import runpy

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from grit_jax.config import Config, ConfigError, check_fields
from grit_jax.models import ARCHITECTURES


def parse_flags(argv: Sequence[str]) -> tuple[Config, str]:
    """Returns the configuration, and the working directory.

    Without --workdir it is `runs/NAME` for a configuration file NAME.py.

    Raises:
      ConfigError: a flag, a file or a field is wrong; the message names it.
    """
    path, argv = _split_off_config(argv)
    config = _load(path)
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "where the run is kept", flag_values=values)
    line = ["train", *argv]
    try:
        _complete_sizes(config, _architecture(line, config.model.architecture))
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=line)
        rest = values(line)[1:]
    except (KeyError, AttributeError) as error:
        raise ConfigError(f"there is no field {_in_one_line(error)}") from None
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(_in_one_line(error)) from None
    if rest:
        raise ConfigError(f"what is {rest[0]!r}? Fields are set as --config.FIELD=VALUE")
    check_fields(config.to_dict())
    return config, values["workdir"].value or f"runs/{path.stem}"


def _split_off_config(argv: Sequence[str]) -> tuple[Path, list[str]]:
    """Returns the configuration file, and the arguments without it."""
    rest = list(argv)
    for place, argument in enumerate(rest):
        name, _, value = argument.partition("=")
        if name in ("--config", "-config"):
            if not value and place + 1 < len(rest):
                value = rest.pop(place + 1)
            del rest[place]
            if value:
                return Path(value), rest
            break
    raise ConfigError("--config=FILE is missing (see the folder configs)")


def _load(path: Path) -> Config:
    if not path.is_file():
        raise ConfigError(f"--config={path}: there is no such file")
    namespace = runpy.run_path(str(path))
    if "get_config" not in namespace:
        raise ConfigError(f"--config={path}: it has no function get_config()")
    try:
        config: Config = namespace["get_config"]()
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"--config={path}: {_in_one_line(error)}") from None
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={path}: its get_config() must return a ConfigDict")
    check_fields(config.to_dict())
    return config


def _architecture(line: Sequence[str], of_file: str) -> str:
    """Returns the architecture that a command line asks for, by default that of the file."""
    values = flags.FlagValues()
    flags.DEFINE_string("config.model.architecture", of_file, "", flag_values=values)
    values(line, known_only=True)
    return values["config.model.architecture"].value or of_file


def _complete_sizes(config: Config, architecture: str) -> None:
    """Fills in the architecture's own sizes, so that each can be set on the command line."""
    if architecture not in ARCHITECTURES:
        return  # What makes the model says so.
    with config.unlocked():
        for name, default in ARCHITECTURES[architecture].sizes.items():
            if name not in config.model.sizes:
                unset = default is None  # Only the sliding window may be.
                config.model.sizes[name] = placeholder(int) if unset else default


def _in_one_line(error: Exception) -> str:
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]  # An error that only wraps another.
    return " ".join(str(error.args[0] if error.args else error).split())
