"""Where the experiment's text comes from: a module reads one source and returns `Fact`s."""
