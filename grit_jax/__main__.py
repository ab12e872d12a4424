"""Runs the command `grit-jax` as `python -m grit_jax`."""

from grit_jax.cli import main

if __name__ == "__main__":
    main()
