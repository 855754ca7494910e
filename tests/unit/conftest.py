"""Fixtures of the unit tests."""

import subprocess
from pathlib import Path

import pytest

from tests.unit.launchers import ROOT, Host
from tests.unit.memory import World


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the launcher as the Makefile does, but elsewhere."""
    path = tmp_path_factory.mktemp("launcher") / "podlane"
    subprocess.run(["make", "--silent", path, f"LAUNCHER={path}"], cwd=ROOT, check=True)
    return path


@pytest.fixture
def host(binary: Path, tmp_path: Path) -> Host:
    """Give a launcher whose agent is away."""
    return Host(binary, tmp_path)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Give a world whose kernel is compared with the plan all the time."""
    return World(tmp_path)


@pytest.fixture
def slow(tmp_path: Path) -> World:
    """Give a world whose kernel is read once at the start, and again only if somebody asks for it."""
    return World(tmp_path, resync_seconds=3600)
