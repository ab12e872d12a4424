"""The command `grit-jax push`, which uploads an export to the Hugging Face Hub."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token

from grit_jax.bucket import one_line
from grit_jax.conversion.hub import NAME, PREFIX, check_name
from grit_jax.conversion.hugging_face import HuggingFaceModel
from grit_jax.conversion.model_card import CARD, with_name
from grit_jax.conversion.opening import open_model
from grit_jax.conversion.peft_adapter import PeftAdapter
from grit_jax.conversion.stored_model import ConversionError


def run(argv: Sequence[str]) -> None:
    """Uploads an export to the Hugging Face Hub.

    Raises:
      ConversionError: the message says what is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="grit-jax push",
        description="Uploads an export to the Hugging Face Hub. HF_ENDPOINT sets another hub.",
    )
    parser.add_argument("folder", type=Path, help="output of grit-jax convert to-hf")
    parser.add_argument("name", help="OWNER/MODEL; it is created if it does not exist")
    parser.add_argument(
        "--private", action="store_true", help="create it so that only its owner can see it"
    )
    arguments = parser.parse_args(argv)
    name = arguments.name.removeprefix(PREFIX)
    print(f"{arguments.folder} -> {push(arguments.folder, name, private=arguments.private)}")


def push(folder: Path, name: str, *, private: bool = False) -> str:
    """Uploads an export in one commit, and returns its address.

    The folder is opened first, so that nothing incomplete is uploaded. Its model card gets the
    name of the model.

    Args:
      folder: the folder of a model or an adapter.
      name: OWNER/MODEL.
      private: whether to create it as a private model.

    Raises:
      ConversionError: the folder is not an export or is damaged, there is no token, or the upload
        failed.
    """
    check_name(name)
    _check_export(folder)
    if get_token() is None:
        raise ConversionError(
            f"pushing {name} needs a token of the Hugging Face Hub: hf auth login, or set HF_TOKEN"
        )
    api = HfApi()
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    operations = []
    for path in files:
        relative = path.relative_to(folder).as_posix()
        content = with_name(path.read_text(), name).encode() if relative == CARD else path
        operations.append(CommitOperationAdd(relative, content))
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        api.create_commit(name, operations, commit_message="Upload with grit-jax")
    except Exception as error:  # The Hub and the network raise many types.
        reasons = [one_line(error)] + ([one_line(error.__cause__)] if error.__cause__ else [])
        raise ConversionError(f"{name} could not be pushed: {' '.join(reasons)}") from None
    return f"{api.endpoint}/{name}"


def _check_export(folder: Path) -> None:
    model = open_model(folder)
    if isinstance(model, PeftAdapter):
        if not NAME.fullmatch(model.settings.base):
            raise ConversionError(
                f"{folder} names the base model {model.settings.base}, which others do not have: "
                "export the adapter with --base-name OWNER/MODEL"
            )
    elif not isinstance(model, HuggingFaceModel):
        raise ConversionError(
            f"{folder} is not an export: make one with grit-jax convert to-hf {folder} OUTPUT"
        )
