"""This machine as a place to build images: package index and certificates, a base of its Debian.

No registry is asked. The base is this machine's own release, so that the MPI in an image fits the
Slurm of the tests. How this machine's pip finds packages is put into that base alone: no recipe and
no other file learns of it.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from containers.apptainer import SOURCES, said

PACKAGES = "buildah mmdebstrap shellcheck squashfs-tools squashfuse uidmap openmpi-bin"
TOOLS = ("buildah", "mmdebstrap", "mksquashfs", "squashfuse", "mpirun")
BASE = "localhost/teams-hpc-base"
CERTIFICATES = Path("/usr/local/share/ca-certificates")
BUNDLE_FOLDER = Path("/etc/ssl/certs")
_PIP_KEYS = frozenset(
    "cert constraint extra-index-url find-links index-url no-index timeout trusted-host".split()
)


def missing_tools() -> str:
    """Why no image can be built and used here; empty if one can."""
    if lacking := [name for name in TOOLS if shutil.which(name) is None]:
        return f"no {', '.join(lacking)} (Debian: apt-get install {PACKAGES})"
    if os.geteuid() != 0:
        return "a base is unpacked with all its owners, which needs root"
    return ""


def pip_settings() -> dict[str, str]:
    """What pip is told on this machine, by files and variables, as far as it concerns an index."""
    listed = subprocess.run(
        (sys.executable, "-m", "pip", "config", "list"),
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    found: dict[str, str] = {}
    lines = [line for line in listed.splitlines() if "=" in line]
    # Variables (":env:.find-links") have the last word.
    for line in sorted(lines, key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    return {name: value for name, value in found.items() if name in _PIP_KEYS}


@dataclass(frozen=True)
class Machine:
    """Folders and files of this machine that pip is pointed to.

    Attributes:
        pip: Its settings.
    """

    pip: dict[str, str]

    @cached_property
    def _places(self) -> list[Path]:
        words = [word for value in self.pip.values() for word in value.split()]
        paths = [Path(word.removeprefix("file://")) for word in words if "/" in word]
        return [path for path in dict.fromkeys(paths) if path.is_absolute() and path.exists()]

    @property
    def folders(self) -> list[Path]:
        """To be seen by builds at the same paths; an index in a folder links to files beside it."""
        folders = (path for path in self._places if path.is_dir())
        return list(dict.fromkeys(p.parent if p.name == "simple" else p for p in folders))

    @property
    def files(self) -> list[Path]:
        """To be copied; certificates are gathered anew in each system."""
        files = (path for path in self._places if path.is_file())
        return [path for path in files if not path.is_relative_to(BUNDLE_FOLDER)]

    @property
    def configuration(self) -> str:
        """A pip.conf."""
        lines = (f"{name} = {' '.join(value.split())}" for name, value in self.pip.items())
        return "\n".join(("[global]", *lines, ""))


@dataclass(frozen=True, slots=True)
class Buildah:
    """Buildah with a store of its own.

    Attributes:
        folder: Holds the store and what goes in and out.
    """

    folder: Path

    def __call__(self, *words: str, timeout: float = 120, folder: Path | None = None) -> str:
        store = ("--root", str(self.folder / "store"), "--runroot", str(self.folder / "run"))
        command = ("buildah", *store, "--storage-driver", "overlay", *words)
        # Of a build's container only the recipe decides.
        return said(
            command, timeout=timeout, folder=folder, environment={"BUILDAH_FORMAT": "docker"}
        )

    def create(self, image: str) -> str:
        """A container to run commands in; its name."""
        return self("from", "--pull-never", image).split()[-1]

    def has(self, image: str) -> bool:
        try:
            self("inspect", "--type", "image", image)
        except AssertionError:
            return False
        return True


def make_base(buildah: Buildah, machine: Machine) -> Path:
    """Import a small Debian of this machine's release as the image `BASE`; also as an archive."""
    archive = buildah.folder / "base.tar"
    if archive.exists():
        return archive
    root = buildah.folder / "root.tar"
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)', Path("/etc/os-release").read_text(), re.M))
    words = ("mmdebstrap", "--quiet", "--variant=apt", "--include=ca-certificates")
    sources = (str(SOURCES),) if SOURCES.exists() else ()
    said((*words, release["VERSION_CODENAME"], str(root), *sources), timeout=400)
    container = buildah("from", "scratch").split()[-1]
    buildah("add", container, str(root), "/")
    root.unlink()
    if CERTIFICATES.is_dir():
        buildah("copy", container, f"{CERTIFICATES}/", f"{CERTIFICATES}/")
    pip_conf = buildah.folder / "pip.conf"
    pip_conf.write_text(machine.configuration)
    for source, target in ((pip_conf, Path("/etc/pip.conf")), *((p, p) for p in machine.files)):
        buildah("copy", container, str(source), str(target))
    folders = [str(folder) for folder in machine.folders]
    run = ("run", "--isolation", "chroot", container, "--")
    buildah(*run, "mkdir", "-p", "/mnt", *folders)
    buildah(*run, "update-ca-certificates")
    buildah("commit", "--quiet", container, BASE)
    buildah("rm", container)
    partial = archive.with_suffix(".partial")
    buildah("push", "--quiet", BASE, f"docker-archive:{partial}:teams-hpc-base:latest")
    partial.rename(archive)
    return archive
