"""How good a model is: retrieval and perplexity on held-out data, beside a lexical baseline."""
