"""The code blocks of the documentation, and a reader who runs them in a clone."""

import dataclasses
import json
import os
from pathlib import Path
import re
import subprocess
import sys

ROOT = Path(__file__).parents[1]
FIRST_PAGE = ROOT / "docs" / "first_steps.md"
PAGES = [FIRST_PAGE, *sorted({*(ROOT / "docs").rglob("*.md")} - {FIRST_PAGE}), ROOT / "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (.*?) -->\n\Z")

# Runs the code blocks from standard input and reports how each ended.
PYTHON = """
import json, sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    name, code = json.loads(line)
    try:
        exec(compile(code, name, "exec"), names)
        print("\\0", flush=True)
    except BaseException:
        print(traceback.format_exc(), end="\\0failed\\n", flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
      page: the file of the block.
      line: line number of the opening fence.
      language: language after the opening fence.
      text: content.
      mark: comment on the line above the fence, or ""; see test_blocks.py.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str

    @property
    def name(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_run(self):
        """Whether the block is run."""
        return self.language in ("sh", "python") and not self.mark.startswith(("not run", "file"))


def blocks_of(page):
    text = page.read_text()
    for found in FENCE.finditer(text):
        before = text[: found.start()]
        mark = MARK.search(before)
        yield Block(page, before.count("\n") + 2, *found.groups(), mark[1] if mark else "")


class Reader:
    """Runs sh blocks in one shell and python blocks in one interpreter, in a folder.

    Args:
      folder: the folder, which gets links to the files of a clone.
      environment: environment variables of the shell and the interpreter.
    """

    def __init__(self, folder, environment):
        self.folder, self._environment = folder, os.environ | environment
        self._variables = folder.with_name(f"{folder.name}.variables")
        self._python = None
        for name in ("train.py", "grit_jax", "models", "Makefile", "setup.py", "constraints.txt"):
            if not (folder / name).exists():
                (folder / name).symlink_to(ROOT / name)
        programs = folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        grit_jax = f"{sys.executable} -m grit_jax"
        # The interpreter of the tests: documented commands must not install packages in it.
        refusal = 'case "$*" in *"-m pip"*) echo "pip is disabled here" >&2; exit 1;; esac'
        for name, command in {"python": sys.executable, "grit-jax": grit_jax}.items():
            (programs / name).write_text(f'#!/bin/sh\n{refusal}\nexec {command} "$@"\n')
            (programs / name).chmod(0o755)

    def run_shell(self, command):
        """Runs a command in the shell and returns the finished process with its output."""
        state = self._variables
        script = f"set -euo pipefail\nset -a\n[ ! -e {state} ] || . {state}\n"
        return subprocess.run(
            ["bash", "-c", f"{script}{command}\nexport -p > {state}"],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    def run_python(self, name, code):
        """Runs code; returns whether it succeeded, and its output."""
        if self._python is None:
            self._python = subprocess.Popen(
                [sys.executable, "-c", PYTHON],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        self._python.stdin.write(json.dumps([name, code]) + "\n")
        self._python.stdin.flush()
        printed = ""
        for line in self._python.stdout:
            printed += line
            if "\0" in line:
                break
        printed, _, ending = printed.partition("\0")
        return ending == "\n", printed

    def stop(self):
        """Stops the interpreter."""
        if self._python is not None:
            self._python.stdin.close()
            self._python.stdout.close()
            self._python.wait()
