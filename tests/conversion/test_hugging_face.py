"""Round trips of weights between grit-jax, transformers and sentence-transformers."""

import dataclasses
import json
import os
from pathlib import Path
import shutil

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import safe_open
import tokenizers

from grit_jax import GritLM
from grit_jax.conversion import HuggingFaceModel, open_model
from grit_jax.conversion.export import write_hugging_face
from grit_jax.conversion.orbax_model import write_orbax
from grit_jax.conversion.stored_tokenizer import find_end_tokens
from grit_jax.objectives.embedding import EmbeddingSpec
from grit_jax.objectives.pooling import normalize
from grit_jax.sharding import make_mesh
from grit_jax.text.examples import chat_text
from grit_jax.text.templates import chat_prompt, embedding_prefix, turns_of_messages
from grit_jax.text.tokenizer import Tokenizer
from grit_jax.training.checkpoints import Checkpoints, RetentionPolicy
from grit_jax.training.joint_loss import LossConfig, make_joint_loss
from grit_jax.training.train_step import Trainer

NAMES = ("mistral", "mixtral", "llama")
COLLATION = json.loads((Path(__file__).parents[1] / "reference" / "collation.json").read_text())


def load(path):
    """Returns a stored model, on one device, in float32."""
    mesh = make_mesh(devices=jax.devices()[:1])
    return GritLM.from_pretrained(path, dtype="float32", mesh=mesh)


def build(path):
    """Returns the Flax module of a stored model."""
    return load(path).model


def tensors(folder):
    """Returns the bytes of every tensor of a folder, with its type and shape."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                found[name] = tensor.dtype, tensor.shape, tensor.tobytes()
    return found


@pytest.fixture(scope="session")
def exported(saved_models, tmp_path_factory):
    """Each model converted to an Orbax checkpoint, and from there to a folder again."""
    root = tmp_path_factory.mktemp("exported")
    folders = {}
    for name, folder in saved_models.items():
        write_orbax(HuggingFaceModel(folder), root / f"{name}_orbax")
        write_hugging_face(open_model(root / f"{name}_orbax"), root / name, shard_bytes=1_500_000)
        folders[name] = root / f"{name}_orbax", root / name
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_gives_the_same_bits(saved_models, exported, name):
    before = tensors(saved_models[name])
    if name == "llama":
        before.pop("lm_head.weight", None)  # Tied: a copy of the embeddings.
    assert tensors(exported[name][1]) == before
    index = json.loads((exported[name][1] / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    assert index["metadata"]["total_size"] == sum(len(content) for *_, content in before.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_export_as_we_read_the_original(saved_models, exported, name):
    import torch
    from transformers import AutoModelForCausalLM

    tokens = np.random.default_rng(0).integers(3, 32000, (2, 100))
    theirs = AutoModelForCausalLM.from_pretrained(exported[name][1], dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(saved_models[name], dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_array_equal(original(torch.tensor(tokens)).logits.numpy(), expected)
    for path in (saved_models[name], exported[name][0], exported[name][1]):
        module = build(path)
        logits = module.logits(module(jnp.asarray(tokens)))
        np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())

    # Greedy text, with the end of text switched off so that all of it is compared.
    prompt = torch.tensor(tokens[:1, :9])
    ids = theirs.generate(
        prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    ).numpy()
    ours = jnp.argmax(module.logits(module(jnp.asarray(ids))), axis=-1)
    np.testing.assert_array_equal(ours[:, 8:-1], ids[:, 9:])


def test_transformers_reads_an_export_in_the_type_that_it_was_given(saved_models, tmp_path):
    from transformers import AutoConfig

    source = tmp_path / "source"
    shutil.copytree(saved_models["mixtral"], source)
    fields = json.loads((source / "config.json").read_text())
    fields.pop("torch_dtype", None)
    # As transformers writes it from version 4.56 on.
    (source / "config.json").write_text(json.dumps(fields | {"dtype": "bfloat16"}))
    write_hugging_face(open_model(source), tmp_path / "exported", dtype="float32")
    assert str(AutoConfig.from_pretrained(tmp_path / "exported").dtype) == "torch.float32"


def test_others_can_read_an_export_and_a_checkpoint_if_the_umask_lets_them(saved_models, tmp_path):
    before = os.umask(0o027)
    try:
        write_orbax(HuggingFaceModel(saved_models["mixtral"]), tmp_path / "orbax")
        write_hugging_face(open_model(tmp_path / "orbax"), tmp_path / "exported")
    finally:
        os.umask(before)
    for folder in (tmp_path / "orbax", tmp_path / "exported"):
        for path in (folder, *folder.rglob("*")):
            assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_instructions_go_with_the_weights(saved_models, tmp_path):
    query, document = embedding_prefix("Find the sense"), embedding_prefix("Read")
    how = {"query_instruction": "Find the sense", "document_instruction": "Read"}
    write_hugging_face(open_model(saved_models["mistral"]), tmp_path / "exported", **how)
    write_orbax(HuggingFaceModel(tmp_path / "exported"), tmp_path / "orbax")
    write_hugging_face(open_model(tmp_path / "orbax"), tmp_path / "again", query_instruction="")
    for folder, prompts in {
        "exported": (query, document),
        "orbax": (query, document),
        "again": (embedding_prefix(""), document),
    }.items():
        spec = EmbeddingSpec.from_fields(open_model(tmp_path / folder).fields)
        assert (spec.query_prompt, spec.document_prompt) == prompts
    # What sentence-transformers reads is what we read.
    path = tmp_path / "exported" / "config_sentence_transformers.json"
    path.write_text(path.read_text().replace("Find the sense", "Find it"))
    spec = EmbeddingSpec.from_fields(open_model(tmp_path / "exported").fields)
    assert spec.query_prompt == embedding_prefix("Find it")
    with pytest.raises(ValueError, match=r"document_instruction='<\|embed\|>' has the marker"):
        EmbeddingSpec.from_fields({}, document_instruction="<|embed|>")


def test_an_export_needs_no_code_of_its_source(saved_models, tmp_path):
    """GritLM 7B brings code of its own, and embedding models are saved as if without a head."""
    from transformers import AutoModelForCausalLM

    source = tmp_path / "source"
    shutil.copytree(saved_models["mistral"], source)
    fields = json.loads((source / "config.json").read_text())
    fields |= {
        "architectures": ["MistralModel"],
        "auto_map": {"AutoModelForCausalLM": "modeling_gritlm7b.MistralForCausalLM"},
    }
    (source / "config.json").write_text(json.dumps(fields))
    write_hugging_face(open_model(source), tmp_path / "exported")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    written = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert written["architectures"] == [type(theirs).__name__]


def test_what_ends_an_answer_goes_with_the_weights(saved_models, tmp_path):
    """Llama 3's chat models end a turn with a token that config.json may not have."""
    source = tmp_path / "source"
    shutil.copytree(saved_models["llama"], source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    write_orbax(HuggingFaceModel(source), tmp_path / "orbax")
    write_hugging_face(open_model(tmp_path / "orbax"), tmp_path / "exported")
    for folder in (source, tmp_path / "orbax", tmp_path / "exported"):
        assert find_end_tokens(open_model(folder)) == [1, 7]
    written = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [1, 7]


@pytest.mark.slow
def test_transformers_tokenizes_and_templates_as_the_original(exported):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported["mistral"][1])
    for case in COLLATION["tokenise"]:
        assert theirs(case["text"]).input_ids == case["ids_special"]
        assert theirs(case["text"], add_special_tokens=False).input_ids == case["ids_plain"]
    chat = [
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": " Hello. "},
        {"role": "user", "content": "Who?"},
    ]
    shown = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    first, second = chat_prompt("Hi!", is_first=True), chat_prompt("Who?", is_first=False)
    assert shown == f"<s>{first}Hello.</s>{second}"
    # As `prepare` reads such messages.
    said = [{"role": "system", "content": "Be kind."}, *chat[:2]]
    said += [{"role": "system", "content": "Be brief."}, chat[2]]
    first, _, second = turns_of_messages(said)
    shown = theirs.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    first, second = chat_prompt(first, is_first=True), chat_prompt(second, is_first=False)
    assert shown == f"<s>{first}Hello.</s>{second}" and "Be brief.\n\nWho?" in shown


@pytest.mark.slow
def test_transformers_reads_an_exported_tokenizer_json_as_we_do(saved_models, exported, tmp_path):
    from transformers import AutoTokenizer

    ours = Tokenizer(str(saved_models["llama"] / "tokenizer.json"))
    checkpoint, folder = exported["llama"]
    # The same, whether it is the model's own or is named.
    write_hugging_face(open_model(checkpoint), tmp_path / "named", tokenizer=ours.name)
    for path in (folder, tmp_path / "named"):
        theirs = AutoTokenizer.from_pretrained(path)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
        assert theirs.pad_token_id is not None
        alone = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        for text in ("One  two\n\n three", "<|user|>\nünï 日本 🙂 1234", " x", "a.\n\n\nb"):
            ids = [ours.bos_id, *ours.encode(text)]
            assert theirs(text).input_ids == alone.encode(text).ids == ids
            assert load(path).tokenizer.encode(text) == ours.encode(text)
        turns = ["Hi!", " Hello. ", "Who\n", "Me"]
        roles = ("user", "assistant") * 2
        chat = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]
        tokens = chat_text(ours, turns, 1000).tokens.tolist()
        assert theirs.apply_chat_template(chat)["input_ids"] == tokens
    assert load(checkpoint).tokenizer.bos_id == ours.bos_id


@pytest.mark.slow
def test_a_projection_of_embeddings_goes_through_sentence_transformers(saved_models, tmp_path):
    from sentence_transformers import SentenceTransformer

    stored = open_model(saved_models["mistral"])
    config = dataclasses.replace(stored.config, embedding_projection_size=12)
    mesh = make_mesh(devices=jax.devices()[:1])
    trainer = Trainer(config, make_joint_loss(LossConfig()), optax.sgd(0.1), mesh)
    state = trainer.state_from(stored.load, seed=0)
    state.parameters["embedding_projection"]["bias"][...] = jnp.arange(12.0)
    folder = epath.Path(tmp_path / "checkpoints")
    with Checkpoints(folder, config, {}, 1, RetentionPolicy(keep=1)) as checkpoints:
        checkpoints.save(1, state)
    for dtype in ("float32", "bfloat16"):
        write_hugging_face(open_model(tmp_path), tmp_path / dtype, dtype=dtype)
    # Back again: the same bits, in the layer's own file too.
    write_orbax(HuggingFaceModel(tmp_path / "float32"), tmp_path / "orbax")
    write_hugging_face(open_model(tmp_path / "orbax"), tmp_path / "again")
    for folder in ("", "2_Dense"):
        before = tensors(tmp_path / "float32" / folder)
        assert before and tensors(tmp_path / "again" / folder) == before

    module, tokenizer = build(tmp_path / "float32"), Tokenizer()
    prefix = embedding_prefix("")
    tokens = [tokenizer.bos_id, *tokenizer.encode(prefix + "A short one")]
    hidden = module(jnp.asarray([tokens]), is_causal=False)[0, 1 + len(tokenizer.encode(prefix)) :]
    expected = normalize(module.project(jnp.mean(hidden, axis=0, keepdims=True)))[0]
    assert expected.shape == (12,)
    for dtype, bound in (("float32", 0.9999), ("bfloat16", 0.99)):
        theirs = SentenceTransformer(str(tmp_path / dtype), device="cpu")
        assert theirs.encode("A short one") @ expected > bound, dtype


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "mixtral"])
def test_a_model_on_eight_devices_in_bfloat16(name):
    folder = Path(__file__).parents[1] / "reference" / f"tiny-{name}"
    mesh = make_mesh(fsdp=2, tensor=2, expert=2)
    model = GritLM.from_pretrained(folder, mesh=mesh).model
    assert model.embedding[...].dtype == jnp.bfloat16
    assert model.layers.attention.query[...].sharding.mesh == mesh
    assert len({str(shard.index) for shard in model.embedding[...].addressable_shards}) == 4
    tokens = jnp.arange(3, 35).reshape(2, 16)
    with jax.set_mesh(mesh):
        logits = model.logits(model(tokens))
    reference = build(folder)
    expected = reference.logits(reference(tokens))
    np.testing.assert_allclose(logits, expected, atol=0.1 * np.abs(expected).max())


@pytest.fixture
def export_with_code(saved_models, tmp_path):
    """An export for whose pooling sentence-transformers needs code of the export's own."""
    folder = tmp_path / "exported"
    write_hugging_face(open_model(saved_models["mistral"]), folder, pooling="weightedmean")
    return folder


def test_an_export_refuses_versions_of_sentence_transformers_that_pool_prompts(
    export_with_code, monkeypatch
):
    import sentence_transformers

    monkeypatch.setattr(sentence_transformers, "__version__", "5.3.0")
    with pytest.raises(
        ImportError, match=r"needs sentence-transformers 5\.4 or newer, not 5\.3\.0"
    ):
        sentence_transformers.SentenceTransformer(
            str(export_with_code), trust_remote_code=True, device="cpu"
        )


@pytest.mark.slow
def test_an_export_that_would_be_read_causally_does_not_load(export_with_code):
    from sentence_transformers import SentenceTransformer

    module = export_with_code / "grit_transformer.py"
    text = module.read_text()
    assert text.count("is_causal = False") == 2
    # As a version of transformers does that does not know the setting.
    module.write_text(text.replace("is_causal = False", "is_causal = True"))
    with pytest.raises(RuntimeError, match="uses causal attention"):
        SentenceTransformer(str(export_with_code), trust_remote_code=True, device="cpu")
