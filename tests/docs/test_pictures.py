"""The pictures are up to date: python docs/pictures"""

import re
import subprocess
import sys

from command_line import ROOT, environment

PICTURES = ROOT / "docs" / "pictures"


def test_pictures_are_up_to_date(tmp_path):
    finished = subprocess.run(
        [sys.executable, PICTURES, tmp_path],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(drawn) == 4
    for name, picture in drawn.items():
        assert picture == (PICTURES / name).read_text(), f"{name}: run python docs/pictures"


def test_every_picture_is_used_and_has_an_alternative_text():
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    shown = dict(re.findall(r"!\[([^\]]{20,})\]\(([\w/.]+)\)", pages))
    files = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.svg")]
    assert {str(path) for path in files} == set(shown.values())
