"""How a model embeds text: its attention pattern, its pooling and its prompts.

Dimensions: B rows, S positions, D hidden size, P embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from jaxtyping import Array, Float

from grit_jax.data.batch import PackedTexts
from grit_jax.models import Decoder, Stream
from grit_jax.objectives.pooling import POOLINGS, normalize, pool
from grit_jax.text.templates import EMBED, GRIT, embedding_prefix, has_markers

# One letter each for embedding instructions, embedding texts, generation instructions and
# generation texts: b (bidirectional) or c (causal).
PATTERNS = ("bbcc", "cbcc", "cccc")

# The field of config.json that stores an `EmbeddingSpec`. Only grit-jax reads it.
GRIT_FIELD = "grit"
STORED = (
    "attention",
    "pooling",
    "normalize",
    "pool_instruction",
    "query_prompt",
    "document_prompt",
    "template",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingSpec:
    """How texts become embeddings.

    Attributes:
      attention: one of `PATTERNS`. The first two letters apply to embedding.
      pooling: "mean", "weightedmean", "lasttoken" or "cls" (see `objectives.pooling`).
      normalize: whether embeddings are scaled to length 1.
      pool_instruction: whether the tokens of the instruction are pooled, too.
      query_prompt: what precedes a query by default, with the model's markers (see
        `text.templates.embedding_prefix`).
      document_prompt: what precedes a document by default.
      template: how an instruction becomes a prompt (see `text.templates.embedding_template`).

    Raises:
      ValueError: the pattern or the pooling is unknown.
    """

    attention: str = "bbcc"
    pooling: str = "mean"
    normalize: bool = True
    pool_instruction: bool = False
    query_prompt: str = EMBED
    document_prompt: str = EMBED
    template: str = GRIT

    def __post_init__(self):
        if self.attention not in PATTERNS:
            raise ValueError(
                f"attention={self.attention!r} must be one of {', '.join(PATTERNS)}: "
                f"{_pattern_problem(self.attention)}"
            )
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r} must be one of {', '.join(POOLINGS)}")

    @classmethod
    def from_fields(
        cls,
        fields: Mapping[str, Any],
        attention: str | None = None,
        pooling: str | None = None,
        *,
        query_instruction: str | None = None,
        document_instruction: str | None = None,
        normalize: bool | None = None,
    ) -> EmbeddingSpec:
        """Returns the spec stored in a model's config.json; without one, that of GritLM.

        Args:
          fields: the content of config.json.
          attention: overrides the stored pattern.
          pooling: overrides the stored pooling.
          query_instruction: overrides the stored prompt of queries, in plain words; "" is none.
          document_instruction: overrides the stored prompt of documents, as for queries.
          normalize: overrides whether embeddings are scaled to length 1.

        Raises:
          ValueError: the pattern or the pooling is unknown, or an instruction has the model's
            markers.
        """
        given = {"attention": attention, "pooling": pooling, "normalize": normalize}
        given = {name: value for name, value in given.items() if value is not None}
        spec = cls(**{**fields.get(GRIT_FIELD, {}), **given})
        instructions = {"query": query_instruction, "document": document_instruction}
        prompts = {
            f"{kind}_prompt": spec.prompt(instruction, f"{kind}_instruction")
            for kind, instruction in instructions.items()
            if instruction is not None
        }
        return dataclasses.replace(spec, **prompts)

    def to_fields(self) -> dict[str, dict[str, Any]]:
        """Returns the fields of config.json that store the spec."""
        return {GRIT_FIELD: {name: getattr(self, name) for name in STORED}}

    def prompt(self, instruction: str, name: str = "instruction") -> str:
        """Returns what precedes a text with an instruction.

        Args:
          instruction: the instruction in plain words; "" is none.
          name: its name in the error message.

        Raises:
          ValueError: the instruction has the markers of the template.
        """
        if has_markers(instruction, self.template):
            marker = EMBED if self.template == GRIT else embedding_prefix("...", self.template)
            marker = marker.strip().replace("\n", "\\n")
            raise ValueError(
                f"{name}={instruction!r} has the marker {marker}, which is added for you: give the "
                "instruction in plain words, or call `encode`"
            )
        return embedding_prefix(instruction, self.template)

    def stream(self, texts: PackedTexts) -> Stream:
        """Returns packed texts as input of the decoder.

        The first letter of the pattern applies to tokens outside of the mask (BOS and the
        instruction), the second letter to the others.
        """
        instruction, text = self.attention[:2]
        return Stream(
            texts.tokens,
            texts.segment_ids,
            texts.positions,
            is_causal=text == "c",
            causal_query_mask=None if instruction == text else ~texts.mask,
        )

    def pool(self, hidden: Float[Array, "B S D"], texts: PackedTexts) -> Float[Array, "texts D"]:
        """Returns the pooled hidden states of each text, zeros for a text without tokens."""
        mask = texts.segment_ids > 0 if self.pool_instruction else texts.mask
        return pool(hidden, mask, texts.segment_ids, texts.positions, texts.num_texts, self.pooling)

    def embed_pooled(
        self, model: Decoder, pooled: Float[Array, "texts D"]
    ) -> Float[Array, "texts P"]:
        """Returns the embeddings of pooled texts, projected and normalized, in float32."""
        embeddings = model.project(pooled)
        return normalize(embeddings) if self.normalize else embeddings


def embed_texts(
    model: Decoder, texts: PackedTexts, spec: EmbeddingSpec
) -> Float[Array, "num_texts P"]:
    """Returns the embedding of each packed text, in float32."""
    hidden, _ = model.forward_streams({"texts": spec.stream(texts)})
    return spec.embed_pooled(model, spec.pool(hidden["texts"], texts))


def _pattern_problem(attention: str) -> str:
    if len(attention) != 4 or set(attention) - set("bc"):
        return (
            "four letters for the instruction and the text of embedding, then of generation, each "
            "b (bidirectional) or c (causal)"
        )
    if attention.endswith("cc"):
        return "a bidirectional instruction would leak its text to tokens that must be causal"
    return "generation must be causal, token by token"
