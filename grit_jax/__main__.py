"""python -m grit_jax: the command grit-jax, of a given Python."""

from grit_jax.cli import main

if __name__ == "__main__":
    main()
