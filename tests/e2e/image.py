"""The one container image of the end-to-end tests, made on the spot from busybox: nothing is downloaded."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import subprocess
import tarfile
from pathlib import Path

IMAGE = "podlane.test/pod:1"
"""The image's name. Sandboxes run its default command, which waits; containers bring their own."""

SERVE_OWN_NAME = ("/bin/sh", "-c", "hostname > /www/index.html; exec httpd -f -p 8080 -h /www")
"""Serves a page on port 8080, both address families, that says which pod answered."""

# Go's names, which images use, of the machines that the kernel names otherwise.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

# A shell, as PID 1 ignores signals that it has no handler for: this ends at SIGTERM at once.
_WAIT = ("/bin/sh", "-c", "trap exit TERM; sleep infinity & wait")


def write_image(path: Path, busybox: Path = Path("/bin/busybox")) -> None:
    """Write a docker archive with `IMAGE` to `path`.

    `busybox` must be statically linked (Debian: busybox-static), as the image holds no libraries.
    """
    layer = write_layer(busybox).getvalue()
    machine = platform.machine()
    config = {
        "architecture": _ARCHITECTURES.get(machine, machine),
        "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": _WAIT},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as archive:
        _add_file(archive, "manifest.json", json.dumps(manifest).encode())
        _add_file(archive, "config.json", json.dumps(config).encode())
        _add_file(archive, "layer.tar", layer)


def write_layer(busybox: Path = Path("/bin/busybox")) -> io.BytesIO:
    """Return the image's root file system as a tar archive, at its beginning."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for directory in ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "www"):
            _add_directory(tar, directory)
        _add_file(tar, "bin/busybox", busybox.read_bytes(), mode=0o755)
        for applet in subprocess.check_output([busybox, "--list"], text=True).split():
            if applet != "busybox":
                _add_link(tar, f"bin/{applet}", "busybox")
        _add_file(tar, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
        _add_file(tar, "etc/group", b"root:x:0:\n")
        _add_file(tar, "www/index.html", b"podlane\n")
    buffer.seek(0)
    return buffer


def _add_directory(tar: tarfile.TarFile, name: str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    tar.addfile(info)


def _add_link(tar: tarfile.TarFile, name: str, target: str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    tar.addfile(info)


def _add_file(tar: tarfile.TarFile, name: str, content: bytes, *, mode: int = 0o644) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), mode
    tar.addfile(info, io.BytesIO(content))
