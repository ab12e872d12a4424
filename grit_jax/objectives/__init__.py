"""The losses of GRIT as pure functions of arrays; they know nothing of models or data files."""
