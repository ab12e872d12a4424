"""Arguments of gritlm, sentence-transformers, transformers and vLLM, accepted or explained.

Each table maps their name to what to do with it. Arguments in no table are Python's TypeError.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, TypeVar

from grit_jax.inference.prompt_encoder import InputError

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class OtherName:
    """What to do with an argument that has another name here, or none.

    Attributes:
      renamed: its name here, if its meaning is the same.
      dropped: values that ask for what happens anyway.
      advice: what to do instead of other values.
    """

    renamed: str | None = None
    dropped: tuple[Any, ...] = ()
    advice: str = ""


# All values of an argument that changes nothing here.
ANY = (object(),)
Names = Mapping[str, OtherName]

LOAD: Names = {
    "model_name_or_path": OtherName(renamed="path"),
    "pretrained_model_name_or_path": OtherName(renamed="path"),
    "torch_dtype": OtherName(renamed="dtype"),
    "attn": OtherName(renamed="attention"),
    "pooling_method": OtherName(renamed="pooling"),
    "mode": OtherName(dropped=ANY),
    "trust_remote_code": OtherName(dropped=ANY),
    "low_cpu_mem_usage": OtherName(dropped=ANY),
    "device": OtherName(dropped=(None,), advice="pass mesh=make_mesh(devices=[...])"),
    "device_map": OtherName(
        dropped=(None, "auto"), advice="weights are split over all devices, or those of mesh="
    ),
    "attn_implementation": OtherName(
        dropped=(None,), advice="it is chosen for the devices; attention= is that of the training"
    ),
    "load_in_8bit": OtherName(dropped=(None, False), advice='pass linear_dtype="int8"'),
    "quantization_config": OtherName(dropped=(None,), advice='pass linear_dtype="int8"'),
}
ENCODE: Names = {
    "sentences": OtherName(renamed="texts"),
    "inputs": OtherName(renamed="texts"),
    "prompt": OtherName(renamed="instruction"),
    "prompt_name": OtherName(
        dropped=(None,), advice="call encode_query or encode_document, which take the stored prompt"
    ),
    "convert_to_numpy": OtherName(
        dropped=(None, True), advice="pass convert_to_tensor=True for JAX arrays"
    ),
    "precision": OtherName(
        dropped=(None, "float32"), advice="quantize the float32 embeddings that are returned"
    ),
    "output_value": OtherName(
        dropped=(None, "sentence_embedding"),
        advice="model.model(tokens) returns the hidden state of each token",
    ),
    "truncate_dim": OtherName(
        dropped=(None,), advice="take the first columns of the embeddings, and normalize them again"
    ),
    "device": OtherName(dropped=(None,), advice="pass mesh= to from_pretrained"),
}
# `encode_query` and `encode_document` take an instruction in plain words.
ENCODE_PLAIN: Names = {
    **ENCODE,
    "prompt": OtherName(
        dropped=(None,),
        advice="pass instruction= in plain words, or the prompt to encode(texts, instruction=...)",
    ),
}
GENERATE: Names = {
    "max_tokens": OtherName(renamed="max_new_tokens"),
    "stop_strings": OtherName(renamed="stop"),
    "tokenizer": OtherName(dropped=ANY),
    "pad_token_id": OtherName(dropped=ANY),
    "use_cache": OtherName(dropped=(None, True), advice="keys and values are always kept"),
    "num_beams": OtherName(dropped=(None, 1), advice="there is no beam search"),
    "num_return_sequences": OtherName(
        dropped=(None, 1), advice="repeat the prompt, and pass a temperature"
    ),
    "max_length": OtherName(dropped=(None,), advice="pass max_new_tokens, without the prompt's"),
    "input_ids": OtherName(advice="pass token ids without padding as prompts"),
    "attention_mask": OtherName(dropped=(None,), advice="pass token ids without padding"),
    "eos_token_id": OtherName(
        dropped=(None,), advice="those of the model end the text; pass stop= for strings"
    ),
    "generation_config": OtherName(dropped=(None,), advice="pass sampling=Sampling(...)"),
    "streamer": OtherName(dropped=(None,), advice="call stream or stream_chat"),
}


def accepts(names: Names) -> Callable[[Function], Function]:
    """Returns a decorator of methods that translates the arguments in a table.

    The methods raise an `InputError` for an argument that has no counterpart here.
    """

    def decorate(method: Function) -> Function:
        @functools.wraps(method)
        def translated(*arguments: Any, **keywords: Any) -> Any:
            for name in names.keys() & keywords.keys():
                _translate(keywords, name, names[name], method.__name__)
            return method(*arguments, **keywords)

        return translated  # type: ignore[return-value]

    return decorate


def _translate(keywords: dict[str, Any], name: str, other: OtherName, method: str) -> None:
    value = keywords.pop(name)
    if other.renamed is not None:
        if other.renamed in keywords:
            raise InputError(f"{method}: {name}= and {other.renamed}= are the same: pass one")
        keywords[other.renamed] = value
    elif other.dropped is not ANY and not _is_one_of(value, other.dropped):
        raise InputError(f"{method} has no argument {name}={value!r:.40}: {other.advice}")


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    # Arrays have no single truth value.
    return any(type(value) is type(other) and value == other for other in values)
