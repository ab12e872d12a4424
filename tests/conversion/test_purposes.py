"""Folders that generate, that embed, or both, made of one model."""

import json
import os
import warnings

import numpy as np
import pytest

from grit_jax.cli import main
from grit_jax.conversion import ConversionError, open_model
from grit_jax.conversion.bidirectional_check import is_bidirectional, warn_if_causal
from grit_jax.conversion.export import write_hugging_face
from grit_jax.conversion.stored_model import ConversionWarning
from grit_jax.models import ARCHITECTURES
from grit_jax.objectives.embedding import EmbeddingSpec

TEXTS = ["Land beside water.", "a", "word " * 20]


def read(path):
    return json.loads(path.read_text())


def test_both_folders_share_the_weights(exported_both, tmp_path, monkeypatch):
    folder, model = exported_both
    generation, embedding = folder / "generation", folder / "embedding"
    weights = "model.safetensors"
    assert (generation / weights).samefile(embedding / weights)
    assert not (generation / "modules.json").exists()
    assert not [*folder.rglob("*.py")]
    assert "is_causal" not in read(generation / "config.json")
    for part in (generation, embedding):
        assert EmbeddingSpec.from_fields(open_model(part).fields) == model.embedding_spec

    def no_links(source, target):
        raise OSError

    monkeypatch.setattr(os, "link", no_links)
    write_hugging_face(open_model(generation), tmp_path / "copied", purpose="both")
    copies = [tmp_path / "copied" / part / weights for part in ("generation", "embedding")]
    assert not copies[0].samefile(copies[1])
    assert copies[0].read_bytes() == copies[1].read_bytes() == (generation / weights).read_bytes()


@pytest.mark.slow
def test_transformers_reads_them_without_code(exported_both):
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    folder, model = exported_both
    tokenizer = AutoTokenizer.from_pretrained(folder / "generation")
    chat = [{"role": "user", "content": "Who are you?"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "generation")
    ids = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=2)[0].tolist()
    answer = ids[inputs.input_ids.shape[1] :]
    assert list(model.generate(inputs.input_ids[0].tolist(), max_new_tokens=12)) == answer

    theirs = AutoModel.from_pretrained(folder / "embedding")
    with torch.no_grad():
        hidden = theirs(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0].numpy()
    mean = hidden.mean(axis=0)
    ours = model.encode(TEXTS[0])
    np.testing.assert_allclose(ours, mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.slow
def test_sentence_transformers_reads_the_embedding_folder_without_code(exported_both):
    from sentence_transformers import SentenceTransformer

    folder, model = exported_both
    theirs = SentenceTransformer(str(folder / "embedding"), device="cpu")
    for way in ("encode_query", "encode_document"):
        got = getattr(theirs, way)(TEXTS)
        np.testing.assert_allclose(getattr(model, way)(TEXTS), got, atol=1e-5, err_msg=way)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    # Exports are never of the type "gemma3", which transformers makes with images.
    sorted({form.model_type for a in ARCHITECTURES.values() for form in a.formats} - {"gemma3"}),
)
def test_transformers_follows_is_causal(model_type):
    """The check that the command makes finds that, and notices if it were not so."""
    assert not is_bidirectional(model_type)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConversionWarning)
        warn_if_causal(model_type)


def test_a_causal_transformers_is_warned_of(exported_both, tmp_path, monkeypatch, capsys):
    """Versions before 5.2 ignore `is_causal`."""
    check = "grit_jax.conversion.bidirectional_check.is_bidirectional"
    monkeypatch.setattr(check, lambda model_type, **fields: False)
    warning = "reads the export with causal attention"
    source = str(exported_both[0] / "embedding")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main(["convert", "to-hf", source, str(tmp_path / "new"), "--for", "embedding"])
    assert warning in capsys.readouterr().err
    main(["convert", "to-hf", source, str(tmp_path / "generation"), "--for", "generation"])
    causal = ["--for", "embedding", "--attention", "cccc"]
    main(["convert", "to-hf", source, str(tmp_path / "causal"), *causal])
    assert warning not in capsys.readouterr().err
    assert "is_causal" not in read(tmp_path / "causal" / "config.json")


def test_what_a_folder_cannot_be_for_is_refused(exported_both, tmp_path):
    model = open_model(exported_both[0] / "embedding")
    with pytest.raises(ConversionError, match="'weightedmean': leave out --for"):
        write_hugging_face(model, tmp_path / "new", purpose="both", pooling="weightedmean")
    with pytest.raises(ValueError, match="purpose='embed' must be one of generation, embedding"):
        write_hugging_face(model, tmp_path / "new", purpose="embed")
    with pytest.raises(SystemExit):
        main(["convert", "to-hf", str(model.folder), "new", "--for", "both", "--adapter"])
    assert not (tmp_path / "new").exists()


def test_servers_read_the_same_embeddings_from_the_files(exported_both):
    """text-embeddings-inference and vLLM read these fields, and ignore unknown ones.

    text-embeddings-inference 0d124dc: `use_bidirectional_attention` of llama, mistral and qwen3,
    `is_causal` of qwen2 (backends/candle/src/models/{llama,mistral,qwen2,qwen3}.rs);
    `pooling_mode_*` of 1_Pooling/config.json, one of cls_token, mean_tokens and lasttoken
    (router/src/lib.rs, PoolConfig); `prompts` (NewSTConfig); `max_seq_length` (STConfig).

    vLLM 0036026: `is_causal` (vllm/model_executor/models/{llama,qwen2,qwen3}.py); the types of
    modules, `pooling_mode_*` of the one for pooling, and `max_seq_length` with `do_lower_case`
    (vllm/transformers_utils/config.py, get_pooling_config and
    get_sentence_transformer_tokenizer_config).
    """
    folder = exported_both[0] / "embedding"
    config = read(folder / "config.json")
    assert (config["is_causal"], config["use_bidirectional_attention"]) == (False, True)
    pooling = read(folder / "1_Pooling" / "config.json")
    modes = {name: on for name, on in pooling.items() if name.startswith("pooling_mode_")}
    assert [name for name, on in modes.items() if on] == ["pooling_mode_mean_tokens"]
    assert {"pooling_mode_cls_token", "pooling_mode_lasttoken"} < modes.keys()
    types = {module["path"]: module["type"] for module in read(folder / "modules.json")}
    assert types["1_Pooling"] == "sentence_transformers.models.Pooling"
    assert types["2_Normalize"] == "sentence_transformers.models.Normalize"
    prompts = read(folder / "config_sentence_transformers.json")["prompts"]
    assert prompts == {"query": "<|user|>\nFind it\n<|embed|>\n", "document": "<|embed|>\n"}
    settings = read(folder / "sentence_bert_config.json")
    assert (settings["max_seq_length"], settings["do_lower_case"]) == (512, False)
    # vLLM embeds with a folder that has modules.json, and generates with others.
    assert not (exported_both[0] / "generation" / "modules.json").exists()
