"""Versions of the specification: which podlane speaks, which command is in which, what it makes of others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.node.contract import (
    NEWEST,
    SUPPORTED,
    VERSIONS,
    WITH_CHECK,
    Container,
    assert_refused,
    launch,
    rows,
)
from tests.node.machine import Machine

COMMANDS = {"ADD": VERSIONS, "DEL": VERSIONS, "CHECK": WITH_CHECK, "GC": (NEWEST,), "STATUS": (NEWEST,)}


@pytest.fixture(scope="module")
def node(clean_node: Machine) -> Machine:
    """Share the node among all tests of this module."""
    return clean_node


@pytest.mark.parametrize("version", VERSIONS)
def test_answers_in_the_version_of_the_configuration(it: Container, version: str) -> None:
    """R01 to R07: results and errors have the cniVersion of the configuration, whichever of the seven it is."""
    assert it.add(cniVersion=version)["cniVersion"] == version
    assert_refused(it.call("ADD", cniVersion=version), 100, version=version)
    it.done("DEL", cniVersion=version)


@pytest.mark.parametrize(
    "version", ["1.2.0", "9.9.9", "1.1", "0.3", "01.1.0", "1.1.0 ", "1.1.0-rc1", "v1.0.0", "1.1.0.0"]
)
def test_other_versions(it: Container, version: str) -> None:
    """P17: versions are compared as they are written; any other one is code 1, and the details have both sides."""
    for command in ("ADD", "DEL"):
        outcome = it.call(command, cniVersion=version)
        assert_refused(outcome, 1, "incompatible CNI versions")
        assert outcome.json()["details"] == f'config is "{version}", plugin supports [{SUPPORTED}]'
    assert rows(it.node) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_each_version(it: Container, command: str) -> None:
    """P18: CHECK is in no version before 0.4.0, GC and STATUS are in none before 1.1.0: code 1 before all else."""
    result = it.add()
    for version in VERSIONS:
        outcome = it.call(command, cniVersion=version, prevResult=result, mtu="no number")
        if command == "DEL":
            assert outcome.exit_code == 0  # which minds nothing but the name
        elif version in COMMANDS[command]:
            assert_refused(outcome, 7, "mtu", version=version)
        else:
            assert_refused(outcome, 1, f"config version does not allow {command}", version=version)


@pytest.mark.parametrize("version", ["x", "1.x.0", "1.0.0.0", "-1.0.0", "1..0", "1.0.0-rc"])
def test_versions_that_are_none(it: Container, version: str) -> None:
    """P19: a version that cannot be read is code 6 where it has to be compared; elsewhere an unknown one, code 1."""
    for command in COMMANDS:
        assert_refused(it.call(command, cniVersion=version), 1 if command in ("ADD", "DEL") else 6, version)


@pytest.mark.parametrize("given", [{}, {"cniVersion": ""}, {"cniVersion": None}])
def test_no_version(it: Container, given: dict[str, Any]) -> None:
    """P20: a configuration without a version is one of 0.1.0."""
    stdin = json.dumps({"name": "podlane", "type": "podlane", **given})
    ids: dict[str, Any] = {"container_id": it.netns.name, "netns": str(it.netns.path), "stdin": stdin}
    result = it.node.cni("ADD", **ids).json()
    assert result["cniVersion"] == "0.1.0"
    assert result.keys() == {"cniVersion", "ip4", "ip6", "dns"}
    for command in ("CHECK", "GC", "STATUS"):
        assert_refused(it.node.cni(command, **ids), 1, f"config version does not allow {command}", version="0.1.0")
    assert it.node.cni("DEL", **ids).exit_code == 0


@pytest.mark.parametrize("version", [1, 1.1, True, [], {}])
def test_version_of_a_wrong_type(it: Container, version: object) -> None:
    """1.1: a version that is no text is code 6, at any command."""
    for command in COMMANDS:
        assert_refused(it.call(command, cniVersion=version), 6, "cniVersion")


@pytest.mark.parametrize("stdin", ["", "{}", "{", '{"cniVersion": "0.3.1"}', '{"cniVersion": "9.9.9"}'])
def test_version_result(node: Machine, stdin: str) -> None:
    """1.3: VERSION names the newest version and all seven, in order, whatever is on stdin: it does not look there."""
    done = launch(node, {"CNI_COMMAND": "VERSION"}, stdin)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"cniVersion": NEWEST, "supportedVersions": list(VERSIONS)}


@pytest.mark.parametrize("later", VERSIONS)
@pytest.mark.parametrize("version", VERSIONS)
def test_version_of_the_configuration_changes(it: Container, version: str, later: str) -> None:
    """2.1: the version may be another one at DEL and CHECK than it was at ADD, as after an upgrade."""
    result = it.add(cniVersion=version)
    if later in WITH_CHECK and version in WITH_CHECK:
        it.done("CHECK", cniVersion=later, prevResult=result)
    it.done("DEL", cniVersion=later, prevResult=result)
    assert rows(it.node) == []
