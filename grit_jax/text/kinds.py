"""The kinds of text that a model trains on: one record per kind.

To add a kind, write its example class and tokenization in `examples`, its canonical form in
`formats`, and its record here. Reading, preparing and batch planning follow from the record.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from grit_jax.text.examples import (
    ChatExample,
    EmbeddingExample,
    Example,
    RejectedExample,
    TextOptions,
    chat_example,
    embedding_example,
)
from grit_jax.text.formats import (
    canonical_chat,
    canonical_embedding,
    chat_form,
    notes_on_chat,
    notes_on_embedding,
)
from grit_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextKind:
    """How one kind of example is recognized, tokenized, stored and split into streams.

    Attributes:
      name: name in manifests, configurations and `TEXT_KINDS`.
      description: the kind with its article, for messages ("an embedding example").
      mixture_suffix: suffix of the mixture's name if a folder holds files of several kinds.
      keys: a line is of this kind if it has one of these keys.
      features: the fields of the canonical form, and how deeply their texts are nested: 1 for a
        list of texts, 2 for a list of lists.
      fields: the fields of a line's object that are read.
      canonical: function from a line's object to its canonical form.
      notes: function from both to what is to be said about how the line was read.
      form: function from the canonical form to what such examples are called, in the plural.
      tokenize: function from the canonical form to an example of token ids.
      options: the fields of `TextOptions` that `tokenize` depends on.
      example: class of its examples, which converts them to bytes and back.
      streams: the streams of packed rows that its texts go to, in order, and which of an example's
        texts each stream takes. The texts of stream S are cut to `TextOptions.S_length` tokens.
    """

    name: str
    description: str
    mixture_suffix: str
    keys: tuple[str, ...]
    features: Mapping[str, int]
    fields: tuple[str, ...]
    canonical: Callable[[dict[str, Any]], dict[str, Any]]
    notes: Callable[[dict[str, Any], dict[str, Any]], list[str]]
    form: Callable[[dict[str, Any]], str]
    tokenize: Callable[[Tokenizer, dict[str, Any], TextOptions], Example]
    options: tuple[str, ...]
    example: type[Example]
    streams: Mapping[str, slice]

    def to_canonical(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Returns the canonical form of a line's object, which `tokenize` takes.

        Raises:
          RejectedExample: the line is of another kind, or a field has the wrong type.
        """
        if not any(key in raw for key in self.keys):
            other = kind_of_line(raw)
            if other is not None:
                raise RejectedExample(f"{TEXT_KINDS[other].description}, not {self.description}")
            raise RejectedExample(f"no {' or '.join(map(repr, self.keys))}")
        return self.canonical(raw)


EMBEDDING = TextKind(
    name="embedding",
    description="an embedding example",
    mixture_suffix="_embedding",
    keys=("query",),
    features={"query": 1, "pos": 2, "neg": 2},
    fields=("query", "pos", "neg", "prompt"),
    canonical=canonical_embedding,
    notes=notes_on_embedding,
    form=lambda canonical: "embedding examples",
    tokenize=embedding_example,
    options=("query_length", "passage_length", "embedding_template"),
    example=EmbeddingExample,
    streams={"query": slice(0, 1), "passage": slice(1, None)},
)

GENERATIVE = TextKind(
    name="generative",
    description="a chat",
    mixture_suffix="_chat",
    keys=("text", "messages"),
    features={"text": 1},
    fields=("text", "messages"),
    canonical=canonical_chat,
    notes=notes_on_chat,
    form=chat_form,
    tokenize=chat_example,
    options=("chat_length", "chat_labels", "chat_template"),
    example=ChatExample,
    streams={"chat": slice(0, 1)},
)

TEXT_KINDS: dict[str, TextKind] = {kind.name: kind for kind in (EMBEDDING, GENERATIVE)}

# All streams, in the order in which the model processes them.
STREAMS: tuple[str, ...] = tuple(stream for kind in TEXT_KINDS.values() for stream in kind.streams)


def kind_of_line(raw: dict[str, Any]) -> str | None:
    """Returns the name of the kind of a line's object, or None if it is of no known kind."""
    for kind in TEXT_KINDS.values():
        if any(key in raw for key in kind.keys):
            return kind.name
    return None
