"""The configuration file of ip-masq-agent."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from ipaddress import IPv6Address, ip_network
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent.config import ConfigError
from agent.ipmasq import Rules, RulesFile, parse

PRIVATE = tuple(map(ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")))

# From its documentation.
CONFIG_MAP = """\
nonMasqueradeCIDRs:
  - 10.40.0.0/14
  - fd00:40::/32
resyncInterval: 60s
masqLinkLocal: true
"""


def test_a_config_map_as_it_is() -> None:
    """A file that its users have is understood."""
    rules = parse(CONFIG_MAP)
    assert rules.non_masquerade == (ip_network("10.40.0.0/14"), ip_network("fd00:40::/32"))
    assert (rules.masq_link_local, rules.masq_link_local_ipv6) == (True, False)


@pytest.mark.parametrize(
    "text", ["", "\n# nothing\n", "{}", "null", "masqLinkLocal: false", "resyncInterval: 1h2m3.5s"]
)
def test_left_out_is_default(text: str) -> None:
    """A key that is left out has its default: RFC 1918 is not masqueraded, nor are link-local destinations."""
    rules = parse(text)
    assert rules.non_masquerade == PRIVATE
    assert not rules.masq_link_local
    assert not rules.masq_link_local_ipv6


@pytest.mark.parametrize("text", ["nonMasqueradeCIDRs: []", '{"nonMasqueradeCIDRs": []}', "nonMasqueradeCIDRs:"])
def test_empty_is_empty(text: str) -> None:
    """An empty list is not the default: everything is masqueraded. Null is an empty list, as Go has it."""
    assert parse(text).non_masquerade == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonMasqueradeCIDR: []", "^nonMasqueradeCIDR: .* the keys are nonMasqueradeCIDRs, masqLinkLocal, "),
        ("non_masquerade: []", "^non_masquerade: "),
        ("nonMasqueradeCIDRs: 10.0.0.0/8", "^nonMasqueradeCIDRs: "),
        ("nonMasqueradeCIDRs: [10.0.0.1/8]", "10.0.0.1/8 has host bits set"),
        ("nonMasqueradeCIDRs: ['::ffff:10.0.0.0/104']", "give an IPv4 prefix"),
        ("nonMasqueradeCIDRs: [10.0.0.0/8, 11.0.0.0/8]\ncidrLimit: 1", "2 nonMasqueradeCIDRs, but cidrLimit is 1"),
        ("masqLinkLocal: 'yes'", "^masqLinkLocal: "),
        ("resyncInterval: 60", "^resyncInterval: "),
        ("resyncInterval: 60 s", "^resyncInterval: "),
        ("- 10.0.0.0/8", "holds a list"),
        ("10.0.0.0/8", "holds a str"),
        ("nonMasqueradeCIDRs: [", "neither YAML nor JSON"),
        ("a: b: c", "neither YAML nor JSON"),
    ],
)
def test_refused(text: str, message: str) -> None:
    """What is wrong is refused, and the message says what it is."""
    with pytest.raises(ConfigError, match=message):
        parse(text)


cidrs = st.lists(
    st.ip_addresses().filter(lambda it: not isinstance(it, IPv6Address) or it.ipv4_mapped is None), max_size=8
).map(lambda found: [f"{address}/{address.max_prefixlen}" for address in found])
files = st.fixed_dictionaries(
    {},
    optional={
        "nonMasqueradeCIDRs": cidrs,
        "masqLinkLocal": st.booleans(),
        "masqLinkLocalIPv6": st.booleans(),
        "cidrLimit": st.integers(8, 64),
        "resyncInterval": st.sampled_from(["60s", "1m30s", "1.5h", "100ms", "0"]),
    },
)


@given(files, st.sampled_from([json.dumps, yaml.safe_dump]))
def test_yaml_and_json_say_the_same(content: dict[str, object], dump: object) -> None:
    """Whatever is given is in the rules, in both formats, and the rest has its default."""
    assert callable(dump)
    rules, defaults = parse(dump(content)), Rules()
    given_ = content.get("nonMasqueradeCIDRs")
    assert rules.non_masquerade == (defaults.non_masquerade if given_ is None else tuple(map(ip_network, given_)))  # type: ignore[call-overload]
    assert rules.masq_link_local == content.get("masqLinkLocal", False)
    assert rules.masq_link_local_ipv6 == content.get("masqLinkLocalIPv6", False)


@settings(deadline=None)
@given(st.text(max_size=200))
@example("a: 2001-13-45")
@example("[" * 500)
@example("? {a: b}\n: c")
@example("&a [*a]")
def test_any_text_is_rules_or_an_error(text: str) -> None:
    """No text does anything but to be understood or refused."""
    with suppress(ConfigError):
        parse(text)


def test_file_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Changes of the file count from the next look on; a file that cannot be used changes nothing, and is told once."""
    path = tmp_path / "rules"
    file = RulesFile(path)
    assert file.current().non_masquerade == PRIVATE
    path.write_text("nonMasqueradeCIDRs: [10.0.0.0/8]")
    assert file.current().non_masquerade == PRIVATE[:1]
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            path.write_text("nonMasqueradeCIDRs: 1")
            assert file.current().non_masquerade == PRIVATE[:1]
        assert len(caplog.records) == 1
        path.write_text("nonMasqueradeCIDRs: [10.0.0.0/8]")
        assert file.current().non_masquerade == PRIVATE[:1]
        path.write_text("nonMasqueradeCIDRs: 1")  # again, so it is news again
        file.current()
        assert len(caplog.records) == 2
    path.unlink()
    assert file.current().non_masquerade == PRIVATE


def test_replaced_by_link(tmp_path: Path) -> None:
    """A file that is a link, which then leads elsewhere, as in a mounted ConfigMap, is followed."""
    for number in (1, 2):
        (tmp_path / f"v{number}").write_text(f"nonMasqueradeCIDRs: [10.{number}.0.0/16]")
    link = tmp_path / "rules"
    link.symlink_to("v1")
    file = RulesFile(link)
    new = tmp_path / "new"
    new.symlink_to("v2")
    new.rename(link)
    assert file.current().non_masquerade == (ip_network("10.2.0.0/16"),)


@pytest.mark.parametrize("content", [b"nonMasqueradeCIDRs: 1", b"\xff\xfe"])
def test_bad_at_the_start(tmp_path: Path, content: bytes) -> None:
    """A file that cannot be used at the start stops it, and the error names it."""
    path = tmp_path / "rules"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        RulesFile(path)
