"""Text sources of the experiment: each module reads one source and returns `Fact`s."""
