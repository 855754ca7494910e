"""Versions of the specification: which there are, what each command needs, and how they are read."""

from __future__ import annotations

import pytest

from cni.call import answer_version, parse
from cni.versions import LATEST
from cni.versions import VERSIONS as KNOWN
from tests.unit.calls import VERSIONS, config, environment, refusal

SUPPORTED = 'plugin supports ["0.1.0" "0.2.0" "0.3.0" "0.3.1" "0.4.0" "1.0.0" "1.1.0"]'
SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}


def test_versions() -> None:
    """The versions are all that there are, the newest last."""
    assert (list(KNOWN), LATEST) == (VERSIONS, VERSIONS[-1])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("command", ["ADD", "DEL", "CHECK", "GC", "STATUS"])
def test_versions_of_commands(command: str, version: str) -> None:
    """P18: ADD and DEL are in every version, CHECK is from 0.4.0 on, GC and STATUS are from 1.1.0 on."""
    since = SINCE.get(command, "0.1.0")
    if VERSIONS.index(version) >= VERSIONS.index(since):
        assert parse(environment(command), config(cniVersion=version)).config.cni_version == version
        return
    error = refusal(environment(command), config(cniVersion=version))
    assert (error.code, error.message) == (1, f"config version does not allow {command}")
    assert error.details == f"{version} < {since}"


@pytest.mark.parametrize("version", [None, ""])
def test_no_version(version: str | None) -> None:
    """P20: a configuration without a version is one of 0.1.0, which has no CHECK."""
    assert parse(environment(), config(cniVersion=version)).config.cni_version == "0.1.0"
    assert answer_version(config(cniVersion=version)) == "0.1.0"
    assert refusal(environment("CHECK"), config(cniVersion=version)).message == "config version does not allow CHECK"


@pytest.mark.parametrize("version", ["1.2.0", "9.9.9", "1.1", "01.1.0"])
@pytest.mark.parametrize("command", ["ADD", "DEL", "CHECK", "GC", "STATUS"])
def test_unknown_versions(command: str, version: str) -> None:
    """P17: a version counts as it is written; any other than the seven is code 1, with both sides' versions."""
    error = refusal(environment(command), config(cniVersion=version))
    assert (error.code, error.message) == (1, "incompatible CNI versions")
    assert error.details == f'config is "{version}", {SUPPORTED}'


@pytest.mark.parametrize("version", ["x", "1.1.0 ", "v1.1.0", "1.1.0.0", "1..0", "-1.1.0", "1.1.0-rc1", "\u0661.1.0"])
def test_unreadable_versions(version: str) -> None:
    """P19: a version that cannot be read is code 6 where it has to be compared, and else an unknown one, code 1."""
    assert {refusal(environment(command), config(cniVersion=version)).code for command in ("ADD", "DEL")} == {1}
    assert {refusal(environment(command), config(cniVersion=version)).code for command in SINCE} == {6}
    assert {refusal(environment(command), config(cniVersion=1)).code for command in ("ADD", *SINCE)} == {6}


@pytest.mark.parametrize(
    ("stdin", "version"), [(b"{", "1.1.0"), (b'{"cniVersion":"9"}', "1.1.0"), (b'{"CNIVERSION":"0.4.0"}', "0.4.0")]
)
def test_answer_version(stdin: bytes, version: str) -> None:
    """An answer is in the version of the configuration if podlane has that, else in the latest, whatever is wrong."""
    assert answer_version(stdin) == version
