"""The workload of `train_step.py` for both sides: model sizes, and the texts of the steps.

Tokens are random. The lengths of the case "sample" are those of batches of the embedded sample,
stored in `sample_lengths.npz`, so that neither the data nor its dependencies are needed.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path

import numpy as np

from grit_jax.data.batch import Batch, ChatBatch, EmbeddingBatch, PackedTexts
from grit_jax.data.packing import fit_rows, pack
from grit_jax.data.shapes import RowLimits, Shape, StepProfile, choose_row_shapes
from grit_jax.text.examples import Text
from grit_jax.text.kinds import STREAMS

LENGTHS_FILE = Path(__file__).with_name("sample_lengths.npz")
GROUP_SIZE = 2
TEMPERATURE = 0.02
# Batches of the sample: queries and chats per step, and number of steps stored.
SAMPLE_QUERIES, SAMPLE_CHATS, SAMPLE_STEPS = 64, 16, 24
# The row limits of config.py, for texts of at most 256, 2,048 and 2,048 tokens.
LIMITS = RowLimits(
    longest={"query": 512, "passage": 2560, "chat": 2560}, length_multiple=128, count_multiple=1
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """A model and its training settings, for both sides.

    Attributes:
      sizes: sizes of the model, by the names of Hugging Face's config.json.
      full_rows: number and length of the queries, passages and chats of the case "full".
      dtype: dtype of the parameters and of the computation.
      remat: "none", or "full", which is gradient checkpointing in torch.
      learning_rate: learning rate of AdamW.
    """

    sizes: dict[str, int]
    full_rows: dict[str, tuple[int, int]]
    dtype: str = "float32"
    remat: str = "none"
    learning_rate: float = 2e-5


SMALL = Setting(
    sizes={
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32_000,
    },
    full_rows={"query": (8, 256), "passage": (16, 256), "chat": (8, 256)},
)
LARGE = Setting(
    sizes={
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32_000,
    },
    full_rows={"query": (8, 256), "passage": (16, 512), "chat": (4, 2048)},
    dtype="bfloat16",
    remat="full",
)
TINY_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
TINY_ROWS = {"query": (4, 16), "passage": (8, 32), "chat": (4, 64)}
TINY = dataclasses.replace(LARGE, sizes=TINY_SIZES, full_rows=TINY_ROWS)
SETTINGS = {"124m": SMALL, "7b": LARGE, "tiny": TINY}


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts by index; an index is unused if a query has no negative."""

    by_index: dict[int, Text]
    num_texts: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text, 0 for an unused index."""
        return [len(self.by_index.get(index, ())) for index in range(self.num_texts)]


# The texts of a step, by stream.
StepTexts = dict[str, Texts]


def num_tokens(texts: StepTexts) -> int:
    """Returns the tokens of all texts of a step."""
    return sum(sum(stream.lengths) for stream in texts.values())


def full_steps(setting: Setting) -> list[StepTexts]:
    """Returns the single step of the case "full": all texts of a stream have equal length.

    A sixteenth of each query and passage is instruction; all but the first token of a chat are
    predicted.
    """
    random = np.random.default_rng(0)
    step = {}
    for name, (count, length) in setting.full_rows.items():
        uncounted = 1 if name == "chat" else length // 16
        shape = [length] * count, [uncounted] * count
        step[name] = _random_texts(random, *shape, setting.sizes["vocab_size"])
    return [step]


def sample_steps(setting: Setting) -> list[StepTexts]:
    """Returns steps whose texts have the lengths of the embedded sample's."""
    random = np.random.default_rng(0)
    with np.load(LENGTHS_FILE) as stored:
        lengths = {name: (stored[name], stored[f"{name}_uncounted"]) for name in STREAMS}
    return [
        {
            name: _random_texts(random, tokens[step], uncounted[step], setting.sizes["vocab_size"])
            for name, (tokens, uncounted) in lengths.items()
        }
        for step in range(SAMPLE_STEPS)
    ]


def _random_texts(
    random: np.random.Generator,
    lengths: Sequence[int] | np.ndarray,
    uncounted: Sequence[int] | np.ndarray,
    vocab_size: int,
) -> Texts:
    texts = {
        index: Text(
            random.integers(3, vocab_size, length).astype(np.int32), np.arange(length) >= start
        )
        for index, (length, start) in enumerate(zip(lengths, uncounted, strict=True))
        if length
    }
    return Texts(texts, len(lengths))


def measure_lengths(prepared: Path) -> None:
    """Stores the lengths of batches of the prepared sample, as training would sample them."""
    # Only this function needs prepared data.
    from grit_jax.data.batches import Batches
    from grit_jax.data.manifest import load_mixture
    from grit_jax.data.sampling import MixedSampler, SingleDatasetSampler

    pairs = load_mixture(prepared, "sample_embedding", "train", "embedding", "embedding")
    chats = load_mixture(prepared, "sample_chat", "train", "generative", "generative")
    samplers = {
        "embedding": SingleDatasetSampler(pairs, SAMPLE_QUERIES, GROUP_SIZE, seed=0),
        "generative": MixedSampler(chats, SAMPLE_CHATS, 0, seed=1),
    }
    batches = Batches(samplers, LIMITS)
    stored: dict[str, list[np.ndarray]] = {}
    for step in range(SAMPLE_STEPS):
        for name, texts in batches[step].streams.items():
            lengths = _tokens_by_text(texts, texts.segment_ids)
            counted = _tokens_by_text(texts, texts.segment_ids[texts.mask])
            stored.setdefault(name, []).append(lengths)
            stored.setdefault(f"{name}_uncounted", []).append(lengths - counted)
    arrays = {name: np.stack(lengths).astype(np.int16) for name, lengths in stored.items()}
    np.savez_compressed(LENGTHS_FILE, allow_pickle=False, **arrays)


def _tokens_by_text(texts: PackedTexts, segment_ids: np.ndarray) -> np.ndarray:
    return np.bincount(segment_ids.ravel(), minlength=texts.num_texts + 1)[1:]


def pack_steps(steps: Sequence[StepTexts]) -> list[Batch]:
    """Returns the batches of steps, in the row shapes that training would choose."""
    shapes = _shapes(steps)
    batches = []
    for texts in steps:
        packed = _pack(texts, shapes)
        passages = texts["passage"]
        indices = np.arange(passages.num_texts, dtype=np.int32)
        passage_ids = np.where(np.array(passages.lengths) > 0, indices, -1).astype(np.int32)
        positives = indices[::GROUP_SIZE]
        pairs = EmbeddingBatch(packed["query"], packed["passage"], positives, passage_ids)
        batches.append(Batch({"embedding": pairs, "generative": ChatBatch(packed["chat"])}))
    return batches


def _shapes(steps: Sequence[StepTexts]) -> list[Shape]:
    """Returns the row shapes for steps, with a profile for each step."""
    lengths = [{name: texts.lengths for name, texts in step.items()} for step in steps]
    profiles = [
        StepProfile(1 / len(steps), {name: [tokens] for name, tokens in step.items()})
        for step in lengths
    ]
    longest = {name: max(max(step[name]) for step in lengths) for name in STREAMS}
    num_texts = {name: len(lengths[0][name]) for name in STREAMS}
    return choose_row_shapes(profiles, longest, num_texts, LIMITS)


def _pack(texts: StepTexts, shapes: Sequence[Shape]) -> dict[str, PackedTexts]:
    """Returns the rows of a step in the first shape that fits its texts."""
    for shape in shapes:
        rows = {
            name: fit_rows(texts[name].lengths, shape[name].count, shape[name].length)
            for name in STREAMS
        }
        fitting = {name: own for name, own in rows.items() if own is not None}
        if len(fitting) == len(rows):
            return {
                name: pack(
                    texts[name].by_index,
                    fitting[name],
                    shape[name].count,
                    shape[name].length,
                    texts[name].num_texts,
                )
                for name in STREAMS
            }
    raise AssertionError("the last shape has a row for each text")
