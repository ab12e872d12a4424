# Image of a worker on GKE (docs/pods.md): grit-jax with pinned versions, for TPUs.
FROM python:3.12-slim
WORKDIR /grit-jax
COPY setup.py pyproject.toml constraints.txt README.md LICENSE train.py ./
COPY configs configs
COPY grit_jax grit_jax
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[tpu]"
# Without a working TPU, fail instead of training on the CPU.
ENV JAX_PLATFORMS=tpu,cpu
ENTRYPOINT ["grit-jax"]
CMD ["--help"]
