"""Runs the code blocks of README.md and docs/ as a reader would.

Each page runs from top to bottom in its own clone: sh blocks in one shell, python blocks in one
interpreter. Lines of json blocks are parsed as training data. A comment on the line above a block
changes this:

    not run: REASON            only check its syntax
    file: NAME                 write it to this file
    prints                     the output of the block before, "..." for parts that may differ
    ends with exit code N      instead of 0
"""

import ast
import json
import re
import subprocess

from documents import PAGES, ROOT, blocks_of
import pytest

from grit_jax.text.columns import RowReader
from grit_jax.text.kinds import TEXT_KINDS, kind_of_line

# Replacements in commands, with the reason.
REPLACEMENTS = {
    "--config.steps=1000": ("--config.steps=1", "a thousand steps take minutes"),
    "evaluate mteb MODEL --module": ("evaluate mteb exported --module", "an existing model"),
    "cp tpu_scripts/settings.example.sh tpu_scripts/settings.sh": (
        'sed \'s/PROJECT=""/PROJECT=my-project/; s/ZONE=""/ZONE=us-east5-b/;'
        ' s/BUCKET=""/BUCKET=my-bucket/\' tpu_scripts/settings.example.sh'
        " > tpu_scripts/settings.sh",
        "filled in by the reader",
    ),
}
# Code that runs after a page's python blocks.
CHECKS = {
    "inference.md": """
assert scores.shape == (2, 2)
streamed = "".join(model.stream(prompt, max_new_tokens=32, stop=["\\n\\n"]))
assert streamed == answer.split("\\n\\n")[0]
assert len(set(samples)) == 2
assert hidden.shape == (1, 3, 32)
""",
    "conversion.md": "assert scores.shape == (2, 2) and len(answer[0]) > len(inputs.input_ids[0])",
    "rag.md": "assert answered.answer and len(sources) == 2 and len(index) == 3",
}
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
# If several pages have the same block, only the first runs it; the README is last.
FIRST = {(block.language, block.text): block for block in reversed(BLOCKS)}


def named(blocks):
    return [pytest.param(block, id=block.name) for block in blocks]


def test_there_are_blocks():
    assert len([block for block in BLOCKS if block.is_run]) > 25
    fences = sum(page.read_text().count("\n```") for page in PAGES)
    assert fences == 2 * len(BLOCKS)  # none is missing


@pytest.mark.parametrize("block", named(BLOCKS))
def test_a_block_is_run_or_says_why_not(block):
    kinds = r"not run: \w.{6,}|file: [\w./]+|prints|ends with exit code \d+|demo results"
    assert not block.mark or re.fullmatch(kinds, block.mark), block.mark
    if block.language == "json":
        for line in map(json.loads, block.text.splitlines()):
            line, _ = RowReader()(line)
            assert TEXT_KINDS[kind_of_line(line)].to_canonical(line)
    elif block.language == "sh":
        command = ["bash", "-n", "-c", block.text]
        checked = subprocess.run(command, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
    elif block.language == "python":
        ast.parse(block.text)
    else:
        assert block.mark, f"a block of {block.language or 'no language'} needs a mark"


def test_every_replaced_command_is_on_a_page():
    shown = "".join(block.text for block in BLOCKS)
    for command in REPLACEMENTS:
        assert command in shown


@pytest.mark.parametrize("extra", sorted(set(re.findall(r'"\.\[(\w+)\]"', str(BLOCKS)))))
def test_extras_exist(extra):
    assert f'        "{extra}": ' in (ROOT / "setup.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=str(page.relative_to(ROOT)))
        for page in PAGES
        if any(
            block.is_run and FIRST[block.language, block.text] == block for block in blocks_of(page)
        )
    ],
)
def test_a_page_does_what_it_says(page, reader):
    printed = ""
    for block in blocks_of(page):
        if FIRST[block.language, block.text] != block:
            continue
        if block.mark.startswith("file: "):
            (reader.folder / block.mark.removeprefix("file: ")).write_text(block.text)
        elif block.mark == "prints":
            assert_like(printed, block)
        elif block.is_run:
            printed = run(block, reader)
    succeeded, printed = reader.run_python(page.name, CHECKS.get(page.name, ""))
    assert succeeded, printed


def run(block, reader):
    if block.language == "python":
        succeeded, printed = reader.run_python(block.name, block.text)
        assert succeeded, f"{block.name}\n{printed}"
        return printed
    command = block.text
    for shown, (replacement, _) in REPLACEMENTS.items():
        command = command.replace(shown, replacement)
    finished = reader.run_shell(command)
    said = finished.stdout + finished.stderr
    code = int(re.sub(r"\D", "", block.mark) or 0)
    assert finished.returncode == code, f"{block.name}\n{said}"
    return said


def assert_like(printed, block):
    pattern = ".*".join(re.escape(part) for part in block.text.strip().split("..."))
    assert re.search(pattern, printed, re.DOTALL), f"{block.name}\n{printed}"
