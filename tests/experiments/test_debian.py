"""Downloads with a fake apt that has one package, and error messages."""

from pathlib import Path

import pytest

from experiments.sources.debian import Debian, FetchError, Mirror

MIRROR = Mirror("http://mirror.invalid/debian", "bookworm")
# Finds its folder in the configuration, like apt.
APT_GET = """#!/bin/sh
case "$*" in
  indextargets*)
    echo "http://mirror.invalid/other stable main"
    echo "http://mirror.invalid/debian bookworm-updates main"
    echo "http://mirror.invalid/debian/ trixie main" ;;
  *update)
    [ ! -e "$0.down" ] || { echo "E: Failed to fetch" >&2; exit 100; }
    state=$(sed -n 's/^Dir::State "\\(.*\\)";/\\1/p' "$3")
    echo "$*" >> "$0.calls"
    echo "Package: it" > "$state/lists/mirror_dists_bookworm_main_binary-amd64_Packages" ;;
  *download\\ it) echo content > it_1%3a2-3_all.deb ;;
  *) echo "E: Unable to locate package" >&2; exit 100 ;;
esac
"""
DPKG_DEB = '#!/bin/sh\nmkdir usr && cp "$2" usr/file\n'
APT_CACHE = """#!/bin/sh
printf 'python3-doc\\n  Depends: python3.13-doc\\n  Suggests: python3.9-doc\\n'
"""


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {"apt-get": APT_GET, "dpkg-deb": DPKG_DEB, "apt-cache": APT_CACHE}
    for name, script in scripts.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_downloads_are_reused(tools, tmp_path, monkeypatch):
    debian = Debian(tmp_path / "downloads", MIRROR)
    assert debian.list_file("Packages").read_text() == "Package: it\n"
    assert (debian.package("it") / "usr/file").read_text() == "content\n"
    assert debian.version("it") == "1:2-3"
    assert debian.dependency("python3-doc", r"python3\.\d+-doc") == "python3.13-doc"
    assert len((tools / "apt-get.calls").read_text().splitlines()) == 1
    monkeypatch.setenv("PATH", "")
    again = Debian(tmp_path / "downloads", MIRROR)
    assert again.package("it") == debian.package("it")
    assert again.list_file("Packages") == debian.list_file("Packages")


def test_the_default_mirror_is_the_machines(tools):
    assert Mirror.of_this_machine() == Mirror("http://mirror.invalid/debian/", "trixie")


def test_failed_downloads_are_named_and_can_be_retried(tools, tmp_path):
    debian = Debian(tmp_path / "downloads", MIRROR)
    (tools / "apt-get.down").touch()
    with pytest.raises(FetchError, match=r"cannot get the lists of bookworm: .*Failed to fetch"):
        debian.package("it")
    (tools / "apt-get.down").unlink()
    with pytest.raises(FetchError, match=r"cannot get other: .*Unable to locate package"):
        debian.package("other")
    (tools / "dpkg-deb").write_text("#!/bin/sh\necho no space >&2; exit 2\n")
    with pytest.raises(FetchError, match=r"cannot get the package it: .*no space"):
        debian.package("it")
    (tools / "dpkg-deb").write_text(DPKG_DEB)
    assert (debian.package("it") / "usr/file").is_file()


def test_a_machine_without_apt_gets_advice(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"no apt-get here; .*--downloads on a Debian machine"):
        Debian(tmp_path / "downloads").package("it")
