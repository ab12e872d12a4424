"""Downloads Debian packages and descriptions with apt, without root.

apt works in its own folder, with the release from the machine's sources or the given one. Existing
downloads are reused, so the folder can be filled on one machine and copied to another.
"""

import dataclasses
from pathlib import Path
import re
import shutil
import subprocess

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Private folders, one architecture so that the lists are equal everywhere, English descriptions,
# uncompressed lists, and none of the machine's hooks.
CONFIGURATION = """\
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Etc::sourcelist "{folder}/sources.list";
Dir::Etc::sourceparts "-";
APT::Architecture "amd64";
#clear APT::Architectures;
APT::Architectures {{ "amd64"; }};
#clear Acquire::Languages;
Acquire::Languages {{ "en"; }};
Acquire::GzipIndexes "false";
APT::Update::Error-Mode "any";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
APT::Sandbox::User "root";
"""
OTHERWISE = (
    "on a machine without apt, fill the folder --downloads on a Debian machine or in a "
    "Debian container, and copy it"
)


class FetchError(Exception):
    """A download failed; the message says what, why and what to do."""


@dataclasses.dataclass(frozen=True)
class Mirror:
    """A Debian mirror and release."""

    address: str
    release: str

    @classmethod
    def of_this_machine(cls) -> "Mirror":
        """Returns the first Debian mirror in the machine's apt sources.

        Raises:
          FetchError: there is none.
        """
        form = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
        listed = _run(["apt-get", "indextargets", "--format", form], "the machine's sources")
        for line in listed.splitlines():
            address, release, component = line.rsplit(" ", 2)
            is_debian = re.search(r"/debian/?$", address) and "-" not in release
            if is_debian and component == "main":
                return cls(address, release)
        raise FetchError(
            "apt's sources on this machine contain no Debian mirror: pass --mirror ADDRESS and "
            "--release NAME (such as bookworm), and install debian-archive-keyring"
        )


class Debian:
    """Downloaded packages and lists of a release.

    Args:
      folder: folder for downloads.
      mirror: the mirror; None for the machine's, looked up when needed.
    """

    def __init__(self, folder: Path, mirror: Mirror | None = None):
        self._folder, self._mirror = folder.resolve(), mirror

    def list_file(self, kind: str) -> Path:
        """Returns apt's list "Translation-en" or "Packages".

        Raises:
          FetchError: the download failed.
        """
        folder = self._folder / "lists"
        if not (folder / kind).is_file():
            self._update()
            found = list((self._apt / "state" / "lists").glob(f"*_{kind}"))
            if len(found) != 1:
                raise FetchError(f"apt-get update left {len(found)} files *_{kind}, not one")
            folder.mkdir(parents=True, exist_ok=True)
            _copy(found[0], folder / kind)
        return folder / kind

    def package(self, name: str) -> Path:
        """Returns the folder of the unpacked package.

        Raises:
          FetchError: the download failed.
        """
        target = self._folder / "packages" / name
        if not target.is_dir():
            self._update()
            aside = self._fresh_folder(f"packages/.{name}")
            self._apt_get(["download", name], name, aside)
            archives = list(aside.glob("*.deb"))
            if len(archives) != 1:
                raise FetchError(f"apt-get download left {len(archives)} archives of {name}")
            (aside / "VERSION").write_text(
                archives[0].name.split("_")[1].replace("%3a", ":") + "\n"
            )
            _run(["dpkg-deb", "-x", archives[0].name, "."], f"the package {name}", aside)
            archives[0].unlink()
            aside.rename(target)
        return target

    def version(self, name: str) -> str:
        """Returns the version of a downloaded package, or "unknown"."""
        file = self._folder / "packages" / name / "VERSION"
        return file.read_text().strip() if file.is_file() else "unknown"

    def dependency(self, name: str, pattern: str) -> str:
        """Returns the dependency of a package whose name matches `pattern`.

        Raises:
          FetchError: there is not exactly one.
        """
        fetched = [path.name for path in (self._folder / "packages").glob("[!.]*")]
        found = {each for each in fetched if re.fullmatch(pattern, each)}
        if not found:
            self._update()
            shown = self._apt_get(["depends", name], name, tool="apt-cache")
            found = set(re.findall(rf"Depends: ({pattern})$", shown, re.M))
        if len(found) != 1:
            raise FetchError(f"{name} should depend on one package {pattern}, found {len(found)}")
        return found.pop()

    @property
    def _apt(self) -> Path:
        return self._folder / "apt"

    def _update(self) -> None:
        """Downloads the package lists once."""
        if (self._apt / "updated").is_file():
            return
        if shutil.which("apt-get") is None:
            raise FetchError(f"there is no apt-get here; {OTHERWISE}")
        mirror = self._mirror or Mirror.of_this_machine()
        for name in ("state/lists/partial", "cache/archives/partial"):
            (self._apt / name).mkdir(parents=True, exist_ok=True)
        (self._apt / "status").touch()
        (self._apt / "apt.conf").write_text(CONFIGURATION.format(folder=self._apt))
        signed = f"[signed-by={KEYRING}] " if KEYRING.is_file() else ""
        source = f"deb {signed}{mirror.address} {mirror.release} main\n"
        (self._apt / "sources.list").write_text(source)
        self._apt_get(["update"], f"the lists of {mirror.release}")
        (self._apt / "updated").touch()

    def _apt_get(
        self, arguments: list[str], what: str, folder: Path | None = None, tool: str = "apt-get"
    ) -> str:
        return _run([tool, "-q", "-c", str(self._apt / "apt.conf"), *arguments], what, folder)

    def _fresh_folder(self, name: str) -> Path:
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def _copy(source: Path, target: Path) -> None:
    """Copies to a temporary name and renames, so that `target` is always complete."""
    aside = target.with_name(f".{target.name}")
    shutil.copyfile(source, aside)
    aside.rename(target)


def _run(command: list[str], what: str, folder: Path | None = None) -> str:
    """Runs an apt or dpkg command and returns its output."""
    try:
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise FetchError(
            f"cannot get {what}: there is no {command[0]} here; {OTHERWISE}"
        ) from error
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
        raise FetchError(f"cannot get {what}: {command[0]} says: {said[:300]}") from error
    return done.stdout
