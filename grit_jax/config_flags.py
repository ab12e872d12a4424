"""The command line of training: --config FILE, --workdir DIR, --config.FIELD=VALUE."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from grit_jax.config import Config, ConfigError, check_fields


def parse_flags(argv: Sequence[str]) -> tuple[Config, str]:
    """Returns the configuration, and the working directory.

    Without --workdir it is `runs/NAME` for a configuration file NAME.py.

    Raises:
      ConfigError: a flag, a file or a field is wrong; the message names it.
    """
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", None, "where the run is kept", flag_values=values)
    path = _config_path(argv)
    if not Path(path).is_file():
        raise ConfigError(f"--config={path}: there is no such file")
    try:
        rest = values(["train", *argv])[1:]
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(_first_line(error)) from None
    if rest:
        raise ConfigError(f"what is {rest[0]!r}? Fields are set as --config.FIELD=VALUE")
    config: Config = holder.value
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"--config={path}: its get_config() must return a ConfigDict")
    check_fields(config.to_dict())
    return config, values["workdir"].value or f"runs/{Path(path).stem}"


def _config_path(argv: Sequence[str]) -> str:
    for place, argument in enumerate(argv):
        if argument.startswith(("--config=", "-config=")):
            return argument.split("=", 1)[1]
        if argument in ("--config", "-config") and place + 1 < len(argv):
            return argv[place + 1]
    raise ConfigError("--config=FILE is missing (see the folder configs)")


def _first_line(error: Exception) -> str:
    text = str(error.args[0] if error.args else error)
    return " ".join(text.split())
