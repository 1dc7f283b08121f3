"""An Apptainer to test with: this machine's own, or Debian's newest in a folder of ours."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from containers.older_glibc import NotSafeError, reach_back

HERE = Path(__file__).parent
SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Where the package looks for its configuration, once it doesn't lie in /usr.
LINKS = {"usr/etc": "../etc", "usr/var": "../var", "usr/lib/etc": "../../etc"}
LINKS["usr/lib/var"] = "../../var"
PROGRAMS = ("usr/bin/apptainer", "usr/lib/*/apptainer/bin/starter")


class UnavailableError(RuntimeError):
    """There is no Apptainer here, and none could be had; the text says why."""


@dataclass(frozen=True, slots=True)
class Apptainer:
    """A program that works on this machine.

    Attributes:
        program: Its path.
        workshop: Where it may put what it needs for a while.
    """

    program: Path
    workshop: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it by its name, and to start containers as root here."""
        path = f"{self.program.parent}{os.pathsep}{os.environ['PATH']}"
        # Root that lacks a capability can't give it on; nobody else is concerned.
        return {"PATH": path, "APPTAINER_NO_PRIVS": "1"} if os.geteuid() == 0 else {"PATH": path}

    def run(
        self,
        *words: str,
        timeout: float = 120,
        environment: Mapping[str, str] | None = None,
        code: int | None = 0,
    ) -> str:
        """What `apptainer WORDS` says, both streams; it has to end with this code (None: any)."""
        return said(
            (str(self.program), *words),
            timeout=timeout,
            environment={**self.environment, **(environment or {})},
            code=code,
        )

    def build(self, *words: str, folder: Path, timeout: float) -> str:
        """What `apptainer build WORDS` says, called in `folder`."""
        inside = (sys.executable, str(HERE / "in_user_namespace.py"))
        command = (*inside, str(self.program), "build", "--force", *words)
        with tempfile.TemporaryDirectory(dir=self.workshop) as room:
            places = {"APPTAINER_CACHEDIR": f"{room}/cache", "APPTAINER_TMPDIR": room}
            return said(command, timeout=timeout, folder=folder, environment=places)


def said(
    command: Sequence[str],
    *,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    code: int | None = 0,
) -> str:
    """Both streams of a command, which has to end with this exit code (None: any)."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )
    if code is not None and done.returncode != code:
        raise AssertionError(f"code {done.returncode}: {' '.join(command)}\n{done.stdout}")
    return done.stdout


def find_apptainer(folder: Path) -> Apptainer:
    """This machine's Apptainer; without one, Debian's newest unpacked below `folder`.

    Raises:
        UnavailableError: With the reason.
    """
    own = shutil.which("apptainer")
    program = Path(own) if own else folder / PROGRAMS[0]
    try:
        if not program.exists():
            _unpack_newest(folder)
        said((str(program), "--version"), timeout=60)
        return Apptainer(program, folder.parent)
    except (AssertionError, NotSafeError, OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"no Apptainer on PATH, nor one from Debian: {error}") from error


def _unpack_newest(folder: Path) -> None:
    """Fetch and unpack; apt's own lists and sources on this machine stay as they are."""
    apt = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial", "parts"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    mirror = re.search(r"^URIs: *(\S+)", SOURCES.read_text(), re.MULTILINE)
    if mirror is None:
        raise UnavailableError(f"no Apptainer on PATH, and {SOURCES} names no mirror to fetch one")
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror[1]} sid main\n")
    settings = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": apt / "parts",
        "Dir::State::lists": apt / "lists",
        "Dir::Cache": apt / "cache",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
    }
    words = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    said(("apt-get", *words, "-qq", "update"), timeout=180)
    said(("apt-get", *words, "-qq", "download", "apptainer"), timeout=180, folder=apt)
    [package] = apt.glob("apptainer_*.deb")
    said(("dpkg-deb", "-x", str(package), str(folder)), timeout=60)
    for name, target in LINKS.items():
        (folder / name).symlink_to(target)
    for pattern in PROGRAMS:
        [program] = folder.glob(pattern)
        reach_back(program)
