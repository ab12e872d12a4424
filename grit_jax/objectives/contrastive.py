"""The contrastive loss of GRIT: each query against every passage of the global batch.

Legend of dimensions: Q queries, P passages, D embedding.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grit_jax.sharding import constrain


def contrastive_loss(
    query_embeddings: Float[Array, "Q D"],
    passage_embeddings: Float[Array, "P D"],
    positives: Int[Array, "Q"],
    passage_contents: Int[Array, "P"],
    temperature: float,
) -> Float[Array, ""]:
    """InfoNCE (arXiv 1807.03748; GRIT, section 2): mean over queries of -log p(own positive).

    Args:
      query_embeddings: one embedding a query, of length 1.
      passage_embeddings: one embedding a passage of the global batch, of length 1.
      positives: index of each query's positive among the passages.
      passage_contents: a number that two passages share if and only if they are the same text; a
        copy of a query's positive is no negative to it. -1 marks a place that holds no passage.
      temperature: what the scores are divided by.
    """
    # Each device scores its own queries against all passages: no device holds the whole matrix.
    queries = constrain(query_embeddings, "batch", None)
    passages = constrain(passage_embeddings, None, None)
    scores = constrain(jnp.einsum("QD,PD->QP", queries, passages) / temperature, "batch", None)

    is_positive = jnp.arange(passages.shape[0]) == positives[:, None]
    is_copy = passage_contents == passage_contents[positives][:, None]
    is_candidate = is_positive | ((passage_contents >= 0) & ~is_copy)
    scores = jnp.where(is_candidate, scores, -jnp.inf)
    own_scores = jnp.take_along_axis(scores, positives[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(scores, axis=1) - own_scores)
