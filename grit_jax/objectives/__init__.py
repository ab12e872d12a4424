"""The losses of GRIT and the pooling of embeddings, as functions of arrays."""
