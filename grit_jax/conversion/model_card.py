"""The model card of an export: a README.md with metadata for the Hugging Face Hub.

It says what the files of the export and its run say, and leaves out everything else.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from grit_jax.conversion.adapted_model import AdaptedModel
from grit_jax.conversion.hub import NAME, PREFIX, name_in_cache
from grit_jax.conversion.run_facts import RunFacts
from grit_jax.conversion.safetensors_folder import ADAPTER_CONFIG, read_json
from grit_jax.conversion.sidecar_files import MODULES, TOKENIZER, TRANSFORMER
from grit_jax.conversion.stored_model import StoredModel
from grit_jax.objectives.embedding import EmbeddingSpec

CARD = "README.md"
# Fields of the configuration that a card shows, and what it calls them.
SHOWN = {
    "loss.temperature": "temperature",
    "loss.embedding_weight": "weight of the embedding loss",
    "loss.generative_weight": "weight of the generative loss",
    "loss.generative_reduction": "reduction of the generative loss",
    "optimizer.learning_rate": "peak learning rate",
    "optimizer.schedule": "learning rate schedule",
    "optimizer.warmup_ratio": "warmup ratio",
    "optimizer.weight_decay": "weight decay",
    "grad_cache_chunks": "GradCache chunks",
    "model.dtype": "type of the computation",
    "seed": "seed",
}
GRIT_JAX = """
from grit_jax import GritLM

model = GritLM.from_pretrained("{name}")
"""
GRIT_JAX_EMBEDS = """\
queries = model.encode_query(["What is a lake?"])
documents = model.encode_document(["Land beside water.", "A body of water."])
scores = queries @ documents.T
"""
GRIT_JAX_CHATS = """\
answer = model.chat([{"role": "user", "content": "What is a lake?"}], max_new_tokens=32)
"""
SENTENCE_TRANSFORMERS = """
from sentence_transformers import SentenceTransformer

embedder = SentenceTransformer("{name}"{code})
queries = embedder.encode_query(["What is a lake?"])
documents = embedder.encode_document(["Land beside water.", "A body of water."])
scores = embedder.similarity(queries, documents)
"""
TRANSFORMERS = """
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{code})
model = AutoModelForCausalLM.from_pretrained("{name}")
chat = [{{"role": "user", "content": "What is a lake?"}}]
prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=32)
"""
PEFT = """
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{name}")
"""


def write_card(
    folder: Path,
    name: str,
    model: StoredModel,
    spec: EmbeddingSpec,
    license_name: str | None = None,
) -> None:
    """Writes the model card of an export whose other files are complete.

    Args:
      folder: the export.
      name: what its code calls the export; `with_name` changes it.
      model: the model that was exported.
      spec: how it embeds.
      license_name: its license, an identifier of the Hub; None for that in the base model's card.
    """
    run = RunFacts.of(model)
    base = _base_name(folder, model, run)
    data = _metadata(folder, name, model, base, license_name or _license_of_base(model))
    sections = [
        f"# {name}",
        _introduction(model, base),
        *_usage(folder, name, model, base),
        *_embedding(spec, folder),
        *(_training(run) if run else ()),
    ]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    (folder / CARD).write_text(text, encoding="utf-8")


def with_name(card: str, name: str) -> str:
    """Returns a card whose code and metadata call the model by another name."""
    old = ModelCard(card).data.get("model_name")
    if not old:
        return card
    card = card.replace(f'"{old}"', f'"{name}"').replace(f"# {old}\n", f"# {name}\n")
    return card.replace(f"model_name: {old}\n", f"model_name: {name}\n")


def _base_name(folder: Path, model: StoredModel, run: RunFacts | None) -> str | None:
    """Returns the name of the base model on the Hub, None if it has none."""
    if (folder / ADAPTER_CONFIG).exists():
        return read_json(folder / ADAPTER_CONFIG)["base_model_name_or_path"]
    if isinstance(model, AdaptedModel) and isinstance(model.base.folder, Path):
        cached = name_in_cache(model.base.folder)
        return cached[0] if cached else None
    weights = str(run.config.get("model.weights", "")) if run else ""
    is_local = Path(weights).exists() or Path(weights).parent.is_dir()
    if weights.startswith(PREFIX) or (NAME.fullmatch(weights) and not is_local):
        return weights.removeprefix(PREFIX)
    return None


def _license_of_base(model: StoredModel) -> str | None:
    """Returns the license in the card of the model that was exported, or of its base."""
    source = model.base if isinstance(model, AdaptedModel) else model
    path = source.folder / CARD
    if not isinstance(path, Path) or not path.is_file():
        return None
    return ModelCard.load(path, ignore_metadata_errors=True).data.get("license")


def _metadata(
    folder: Path, name: str, model: StoredModel, base: str | None, license_name: str | None
) -> ModelCardData:
    embeds, is_adapter = (folder / MODULES).exists(), (folder / ADAPTER_CONFIG).exists()
    tags = ["grit-jax"]
    library, task = "transformers", "text-generation"
    if embeds:
        library, task = "sentence-transformers", "sentence-similarity"
        tags += ["sentence-transformers", "sentence-similarity", "feature-extraction"]
    if model.config.has_lm_head:
        tags.append("text-generation")
    elif not embeds:
        task = "feature-extraction"
    if is_adapter:
        library = "peft"
        tags.append("lora")
    return ModelCardData(
        model_name=name,
        base_model=base if base and NAME.fullmatch(base) else None,
        license=license_name,
        library_name=library,
        pipeline_tag=task,
        tags=tags,
    )


def _introduction(model: StoredModel, base: str | None) -> str:
    abilities = "embeds and generates text" if model.config.has_lm_head else "embeds text"
    start = f", finetuned from {base}" if base and NAME.fullmatch(base) else ""
    return f"A model of the architecture {model.config.architecture} that {abilities}{start}."


def _usage(folder: Path, name: str, model: StoredModel, base: str | None) -> Iterable[str]:
    yield "## Usage"
    chats = model.config.has_lm_head
    code = GRIT_JAX.format(name=name) + GRIT_JAX_EMBEDS + (GRIT_JAX_CHATS if chats else "")
    yield _block("grit-jax", code)
    if (folder / ADAPTER_CONFIG).exists():
        auto = "AutoModelForCausalLM" if chats else "AutoModel"
        yield _block("PEFT", PEFT.format(name=name, base=base, auto=auto))
        return
    if (folder / MODULES).exists():
        needs_code = ", trust_remote_code=True" if (folder / TRANSFORMER).exists() else ""
        yield _block(
            "sentence-transformers", SENTENCE_TRANSFORMERS.format(name=name, code=needs_code)
        )
    is_causal = read_json(folder / "config.json").get("is_causal", True)
    if chats and is_causal:
        needs_code = ", trust_remote_code=True" if (folder / TOKENIZER).exists() else ""
        yield _block("transformers", TRANSFORMERS.format(name=name, code=needs_code))


def _block(library: str, code: str) -> str:
    return f"With {library}:\n\n```python\n{code.strip()}\n```"


def _embedding(spec: EmbeddingSpec, folder: Path) -> Iterable[str]:
    if not ((folder / MODULES).exists() or (folder / ADAPTER_CONFIG).exists()):
        return
    yield "## Embeddings"
    rows = {
        "attention": "bidirectional" if spec.attention[1] == "b" else "causal",
        "pooling": spec.pooling,
        "prompt of queries": repr(spec.query_prompt) if spec.query_prompt else "",
        "prompt of documents": repr(spec.document_prompt) if spec.document_prompt else "",
    }
    yield _table(("", ""), ((name, value) for name, value in rows.items() if value))


def _training(run: RunFacts) -> Iterable[str]:
    yield "## Training"
    rows: dict[str, Any] = {"losses": " and ".join(run.data), "steps": run.step}
    for kind, fields in run.data.items():
        rows[f"{kind} batch size"] = fields["batch_size"]
        if fields.get("group_size"):
            rows["passages per query, at most"] = fields["group_size"]
    rows |= {title: run.config[field] for field, title in SHOWN.items() if field in run.config}
    if run.config.get("lora.rank"):
        rows |= {
            f"LoRA {name}": run.config[f"lora.{name}"] for name in ("rank", "alpha", "targets")
        }
    yield _table(("", ""), rows.items())
    yield "Share of each dataset in the batches:"
    yield _table(("dataset", "kind", "share"), _datasets(run.data))
    if run.held_out:
        yield "## Results"
        yield f"On held-out data, after {run.step:,} steps:"
        yield _table(("metric", "value"), ((k, f"{v:.4g}") for k, v in run.held_out.items()))


def _datasets(data: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    for kind, fields in data.items():
        total = sum(dataset["turns"] for dataset in fields["datasets"].values())
        for name, dataset in fields["datasets"].items():
            yield name, kind, f"{dataset['turns'] / total:.1%}"


def _table(titles: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
