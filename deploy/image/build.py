"""Builds the agent's container image offline from the registries of images: of Debian packages, PyPI's wheels and us.

    python deploy/image/build.py OUTPUT.tar [--name NAME] [--snapshot 20261101T000000Z]

The output is a docker archive (`podman load`, `ctr images import`, `kind load image-archive`). There are three layers,
from what seldom changes to what often does; the first two are kept in build/image and used again. The same packages
give the same bytes: files are sorted, belong to root and are of one date. Needs root, mmdebstrap, and the launcher.

There is no shell in the image, nor anything else that the agent does not run; the Containerfile beside this script
makes a larger one, with Debian's own, where a builder of images is at hand.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import io
import json
import platform
import py_compile
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "image"
DEFAULT_NAME = "podlane:dev"

SUITE = "bookworm"
_SNAPSHOTS = "http://snapshot.debian.org/archive"
_FORMAT = 1  # part of the caches' keys: raise it when what this script writes changes

# What a container does not read. Licences (doc/*/copyright) stay.
_UNUSED = ("usr/share/man/", "usr/share/locale/", "usr/share/info/", "usr/share/lintian/", "var/lib/dpkg/info/")
_DOCUMENTS = "usr/share/doc/"

_HOME = "usr/lib/podlane"  # agent.sections finds bpf/ beside the agent
_WHEELS = "usr/local/lib/python3.11/dist-packages"  # on Debian's sys.path
_COMMAND = "usr/bin/podlane-agent"
_FILES = {"etc/passwd": "root:x:0:0:root:/:/usr/sbin/nologin\n", "etc/group": "root:x:0:\n"}
_LINKS = {"var/run": "/run"}  # CNI_NETNS is /var/run/netns/… with some runtimes

# Go's names, which images use, of the machines that the kernel names otherwise.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def main() -> None:
    """Build the image that the command line asks for."""
    parser = argparse.ArgumentParser(description="Build podlane's container image from Debian packages.")
    parser.add_argument("output", type=Path, help="the docker archive to write")
    parser.add_argument("--name", default=DEFAULT_NAME, help=f"the image's name; default: {DEFAULT_NAME}")
    parser.add_argument("--snapshot", default="", metavar="TIME", help="Debian as it was then, of snapshot.debian.org")
    arguments = parser.parse_args()
    build(arguments.output, name=arguments.name, snapshot=arguments.snapshot)


def build(output: Path, *, name: str = DEFAULT_NAME, snapshot: str = "", cache: Path = CACHE) -> None:
    """Write the image to `output` as a docker archive that names it `name`.

    Raises OSError, and CalledProcessError if mmdebstrap or pip fails.
    """
    cache.mkdir(parents=True, exist_ok=True)
    requirements = HERE / "requirements.txt"
    packages = (HERE / "packages.txt").read_text()
    base = cache / f"debian-{_key(packages, snapshot)}.tar"
    wheels = cache / f"python-{_key(requirements.read_text())}.tar"
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        own = Path(scratch) / "podlane.tar"
        if not base.exists():
            _write_debian(base, packages.split(), snapshot)
        if not wheels.exists():
            _write_wheels(wheels, requirements)
        _write_podlane(own)
        _write_archive(output, name, [base, wheels, own])


def _write_debian(layer: Path, packages: list[str], snapshot: str) -> None:
    """Extract packages and what they depend on; nothing of theirs is run, since no service or shell is wanted."""
    sources = []  # mmdebstrap's own: Debian's archive, with its updates and security updates
    if snapshot:
        sources = [f"deb {_SNAPSHOTS}/debian/{snapshot} {suite} main" for suite in (SUITE, f"{SUITE}-updates")]
        sources.append(f"deb {_SNAPSHOTS}/debian-security/{snapshot} {SUITE}-security main")
    with _scratch(layer.parent) as tree:
        command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=extract", f"--include={','.join(packages)}"]
        command += ["--skip=check/empty"] + ['--aptopt=Acquire::Check-Valid-Until "false"'] * bool(snapshot)
        subprocess.run([*command, SUITE, str(tree), *sources], check=True)
        for path, text in _FILES.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
        for path, target in _LINKS.items():
            (tree / path).unlink(missing_ok=True)
            (tree / path).symlink_to(target)
        _compile(tree, "usr/lib/python3.11", "usr/lib/python3")
        _write_layer(layer, tree)


def _write_wheels(layer: Path, requirements: Path) -> None:
    with _scratch(layer.parent) as tree:
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-compile"]
        chosen = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement", str(requirements)]
        subprocess.run([*pip, *chosen, "--target", str(tree / _WHEELS)], check=True)
        shutil.rmtree(tree / _WHEELS / "bin", ignore_errors=True)  # their paths are of this machine
        _compile(tree, _WHEELS)
        _write_layer(layer, tree)


def _write_podlane(layer: Path) -> None:
    with _scratch(layer.parent) as tree:
        home = tree / _HOME
        for folder, kind in (("agent", "*.py"), ("cni", "*.py"), ("bpf", "*.[ch]")):
            for file in (ROOT / folder).rglob(kind):
                target = home / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        metadata = home / f"podlane-{_version()}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: podlane\nVersion: {_version()}\n")
        shutil.copy(ROOT / "build" / "podlane", home / "podlane")
        on_path = tree / _WHEELS / "podlane.pth"
        on_path.parent.mkdir(parents=True)
        on_path.write_text(f"/{_HOME}\n")
        (tree / _COMMAND).parent.mkdir(parents=True)
        shutil.copy(HERE / "podlane-agent", tree / _COMMAND)
        _compile(tree, _HOME)
        _write_layer(layer, tree)


def _version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def _compile(tree: Path, *folders: str) -> None:
    """Compile Python ahead, since the container cannot write, into files that hold no dates."""
    if sys.version_info[:2] != (3, 11):
        raise RuntimeError(f"{SUITE} has Python 3.11, this is {platform.python_version()}: use /usr/bin/python3 of it")
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    for folder in folders:
        compileall.compile_dir(tree / folder, quiet=2, stripdir=str(tree), prependdir="/", invalidation_mode=mode)


def _write_layer(layer: Path, tree: Path) -> None:
    """Write a tree as a tar archive, whole or not at all, that depends on names, modes and content only."""
    draft = layer.with_suffix(".tmp")
    with tarfile.open(draft, "w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(tree.rglob("*")):
            name = str(path.relative_to(tree))
            if not _is_unused(name):
                info = tar.gettarinfo(path, name)
                info.mtime = info.uid = info.gid = 0
                info.uname = info.gname = ""
                with path.open("rb") if info.isreg() else io.BytesIO() as content:
                    tar.addfile(info, content)
    draft.rename(layer)


def _is_unused(name: str) -> bool:
    if name.startswith(_DOCUMENTS):
        return not name.endswith("/copyright") and name.count("/") > _DOCUMENTS.count("/")
    return name.startswith(_UNUSED)


def _write_archive(output: Path, name: str, layers: list[Path]) -> None:
    digests = [_digest(layer) for layer in layers]
    machine = platform.machine()
    config = {
        "architecture": _ARCHITECTURES.get(machine, machine),
        "os": "linux",
        "config": {
            "Entrypoint": ["/" + _COMMAND],
            "Env": ["PATH=/usr/bin:/bin:/usr/sbin:/sbin"],
            "Labels": {"org.opencontainers.image.title": "podlane"},
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]},
    }
    names = [f"{digest}.tar" for digest in digests]
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": names}]
    with tarfile.open(output, "w") as archive:
        for file, document in (("manifest.json", manifest), ("config.json", config)):
            content = json.dumps(document, indent=1).encode()
            info = tarfile.TarInfo(file)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for file, layer in zip(names, layers, strict=True):
            info = tarfile.TarInfo(file)
            info.size = layer.stat().st_size
            with layer.open("rb") as content_of:
                archive.addfile(info, content_of)


def _digest(layer: Path) -> str:
    with layer.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((str(_FORMAT), SUITE, platform.machine(), *parts)).encode()).hexdigest()[:16]


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as directory:
        tree = Path(directory) / "tree"
        tree.mkdir(mode=0o755)
        yield tree


if __name__ == "__main__":
    main()
