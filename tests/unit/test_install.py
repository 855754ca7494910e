"""What the agent puts where a runtime looks: real files, read while they are replaced."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.install import InstallError, install_conflist, install_launcher

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Give a launcher to install."""
    path = tmp_path / "launcher"
    path.write_bytes(b"first")
    return path


def test_launcher(tmp_path: Path, source: Path) -> None:
    """The launcher is installed as `podlane`, executable for all, in a directory that is made if need be."""
    previous = os.umask(0o077)
    try:
        install_launcher(source, tmp_path / "opt" / "bin")
    finally:
        os.umask(previous)
    (installed,) = (tmp_path / "opt" / "bin").iterdir()
    assert (installed.name, installed.read_bytes()) == ("podlane", b"first")
    assert installed.stat().st_mode & 0o7777 == 0o755


def test_conflist(tmp_path: Path) -> None:
    """The configuration is one that every runtime can parse, and names the versions for those that choose."""
    install_conflist(tmp_path, "cluster-net")
    (installed,) = tmp_path.iterdir()
    assert installed.name == "10-podlane.conflist"
    assert installed.stat().st_mode & 0o7777 == 0o644
    assert json.loads(installed.read_text()) == {
        "cniVersion": "1.0.0",
        "cniVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
        "name": "cluster-net",
        "plugins": [
            {
                "type": "podlane",
                "capabilities": {"ips": True, "mac": True, "ipRanges": True, "portMappings": True, "bandwidth": True},
            }
        ],
    }


def installs(tmp_path: Path, source: Path) -> dict[Path, Callable[[], None]]:
    """Return both installations, by the file that they make."""
    return {
        tmp_path / "bin" / "podlane": lambda: install_launcher(source, tmp_path / "bin"),
        tmp_path / "conf" / "10-podlane.conflist": lambda: install_conflist(tmp_path / "conf", "n"),
    }


def test_unchanged_file_is_left_alone(tmp_path: Path, source: Path) -> None:
    """Installed again, the same file stays as it is: no runtime reloads for nothing."""
    for path, install in installs(tmp_path, source).items():
        install()
        os.utime(path, ns=(1, 1))
        before = path.stat()
        install()
        after = path.stat()
        assert (after.st_ino, after.st_mtime_ns, after.st_ctime_ns) == (before.st_ino, 1, before.st_ctime_ns)


@pytest.mark.parametrize("change", ["content", "mode", "gone", "dangling link"])
def test_changed_file_is_put_right(tmp_path: Path, source: Path, change: str) -> None:
    """Whatever has become of an installed file, installing it again makes it right."""
    for path, install in installs(tmp_path, source).items():
        install()
        before = path.read_bytes(), path.stat().st_mode
        if change == "content":
            path.write_bytes(b"other")
        elif change == "mode":
            path.chmod(0o600)
        else:
            path.unlink()
        if change == "dangling link":
            path.symlink_to("/gone")
        install()
        assert (path.read_bytes(), path.stat().st_mode) == before
        assert not path.is_symlink()
        assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_leftover_of_a_crash(tmp_path: Path, source: Path) -> None:
    """The temporary file of an agent that died while it installed is taken over."""
    for path, install in installs(tmp_path, source).items():
        path.parent.mkdir()
        path.with_name(f".{path.name}.tmp").write_bytes(b"x" * 10_000)
        install()
        assert [each.name for each in path.parent.iterdir()] == [path.name]
        assert len(path.read_bytes()) < 1000


def test_nobody_sees_half_a_file(tmp_path: Path, source: Path) -> None:
    """Read over and over while it is replaced, a file is always one of the two, whole, and never missing."""
    contents = {bytes([byte]) * 300_000 for byte in b"ab"}
    conf_names = {"10-podlane.conflist"}
    seen: set[bytes] = set()
    listed: set[str] = set()
    wrong: list[object] = []
    done = threading.Event()
    launcher = tmp_path / "podlane"

    def read() -> None:
        while not done.is_set():
            try:
                content = launcher.read_bytes()
                json.loads((tmp_path / "10-podlane.conflist").read_text())
                listed.update(os.listdir(tmp_path))  # noqa: PTH208
            except (OSError, ValueError) as error:
                wrong.append(error)
                return
            (seen.add if content in contents else wrong.append)(content)

    def replace(round_: int) -> None:
        source.write_bytes(sorted(contents)[round_ % 2])
        install_launcher(source, tmp_path)
        install_conflist(tmp_path, f"net{round_}" * 500)

    replace(0)
    reader = threading.Thread(target=read)
    reader.start()
    for round_ in range(1, 60):
        replace(round_)
    done.set()
    reader.join()
    assert not wrong
    assert seen == contents
    assert {name for name in listed if name.endswith((".conf", ".conflist", ".json"))} == conf_names


def test_launcher_in_use_can_be_replaced(tmp_path: Path, source: Path) -> None:
    """A runtime that is just executing the old launcher is not in the way of the new one."""
    sleep = shutil.which("sleep")
    assert sleep
    shutil.copy(sleep, source)
    install_launcher(source, tmp_path / "bin")
    with subprocess.Popen([tmp_path / "bin" / "podlane", "60"]) as running:
        source.write_bytes(b"new")
        install_launcher(source, tmp_path / "bin")
        assert running.poll() is None
        running.kill()
    assert (tmp_path / "bin" / "podlane").read_bytes() == b"new"


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_durable_before_it_has_its_name(tmp_path: Path) -> None:
    """The content is on the disk before the name is, and the name before the agent says that it is ready."""
    script = "import sys, pathlib, agent.install as i; i.install_conflist(pathlib.Path(sys.argv[1]), 'n')"
    calls = "trace=fsync,rename,renameat,renameat2"
    command = [
        "strace",
        "-y",
        "-o",
        str(tmp_path / "trace"),
        "-e",
        calls,
        sys.executable,
        "-c",
        script,
        str(tmp_path / "conf"),
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    lines = [line for line in (tmp_path / "trace").read_text().splitlines() if str(tmp_path) in line]
    patterns = [
        r"fsync\(\d+<.*/\.10-podlane\.conflist\.tmp>\) += 0",
        r"rename.*conflist.* = 0",
        r"fsync\(\d+<.*/conf>\) += 0",
    ]
    assert len(lines) == len(patterns)
    assert all(re.match(pattern, line) for pattern, line in zip(patterns, lines, strict=True))


def test_missing_source(tmp_path: Path) -> None:
    """A launcher that is not there is named, together with the setting that leads to it."""
    with pytest.raises(InstallError) as caught:
        install_launcher(tmp_path / "gone", tmp_path / "bin")
    assert str(caught.value) == (
        f"cannot read the launcher {tmp_path}/gone: No such file or directory; is paths.launcher right?"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("obstacle", ["directory is a file", "file is a directory"])
def test_place_that_cannot_be_written(tmp_path: Path, source: Path, obstacle: str) -> None:
    """Where a file cannot be put, the error names it."""
    for path, install in installs(tmp_path, source).items():
        if obstacle == "directory is a file":
            path.parent.write_bytes(b"")
        else:
            path.mkdir(parents=True)
        with pytest.raises(InstallError, match=f"^cannot install {re.escape(str(path))}: "):
            install()
