"""From text files to packed batches: templates, tokens, prepared datasets, schedule, packing."""
