"""A line on standard error while a program compiles, if that takes long."""

from collections.abc import Hashable, Iterator
import contextlib
import sys
import threading

from grit_jax.processes import is_primary

# Programs that compile faster are not announced.
NOTICE_SECONDS = 4.0


class CompilationNotice:
    """Announces the calls that compile: the first ones with arguments of new shapes."""

    def __init__(self):
        self._seen: set[Hashable] = set()

    @contextlib.contextmanager
    def around(self, purpose: str, *shape: Hashable) -> Iterator[None]:
        """A context manager around the call of a program.

        Args:
          purpose: what the program does, after "the program that".
          *shape: what else the program depends on.
        """
        if (purpose, *shape) in self._seen or not is_primary():
            yield
            return
        timer = threading.Timer(NOTICE_SECONDS, _announce, (purpose,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
        self._seen.add((purpose, *shape))


def _announce(purpose: str) -> None:
    line = f"grit-jax: compiling the program that {purpose}; later calls use it again"
    print(line, file=sys.stderr, flush=True)
