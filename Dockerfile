# What a worker runs on GKE (docs/pods.md): grit-jax, with the pinned set for TPUs.
FROM python:3.12-slim
WORKDIR /grit-jax
COPY setup.py pyproject.toml constraints.txt README.md LICENSE train.py ./
COPY configs configs
COPY grit_jax grit_jax
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[tpu]"
# A worker whose TPU is dead is to fail, and not to train on its CPU.
ENV JAX_PLATFORMS=tpu,cpu
ENTRYPOINT ["grit-jax"]
CMD ["--help"]
