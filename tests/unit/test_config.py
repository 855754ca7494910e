"""The configuration file: what it may hold, and what is said of everything else."""

from __future__ import annotations

import ast
import inspect
import socket
from contextlib import suppress
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from agent import config, sections
from agent.config import Config, ConfigError, load
from agent.sections import Paths, Subnet


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the path of a configuration file that does not exist yet."""
    return tmp_path / "agent.yaml"


def test_name_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node is called what its environment says, else as its host."""
    monkeypatch.delenv("NODE_NAME", raising=False)
    assert Config().node_name == socket.gethostname().lower()
    monkeypatch.setenv("NODE_NAME", "worker-1")
    assert Config().node_name == "worker-1"
    assert Config(node_name="worker-2").node_name == "worker-2"


@pytest.mark.parametrize("text", ["", "---\n", "# a comment\n", "{}", "null"])
def test_every_default_applies(file: Path, text: str) -> None:
    """A file that says nothing is a valid configuration, the same as none at all."""
    file.write_text(text)
    assert load(file) == Config()


def test_defaults() -> None:
    """The defaults are usable: one range of each family, and paths that are absolute."""
    config = Config()
    ranges = [each.range() for each in config.ranges]
    assert [str(each) for each in ranges] == [
        "10.244.0.0/24 (10.244.0.1 to 10.244.0.254)",
        "fd00:10:244::/64 (fd00:10:244::1 to fd00:10:244:0:ffff:ffff:ffff:ffff)",
    ]
    assert all(path.is_absolute() for _, path in config.paths)
    assert (config.paths.bpf_source / "datapath.c").is_file()


def test_everything_can_be_set(file: Path) -> None:
    """Each key is taken over, and a range may be a part of its subnet."""
    file.write_text(
        """
        network: other
        ranges:
          - {subnet: 192.0.2.0/24, first: 192.0.2.10, last: 192.0.2.20}
          - {subnet: "2001:db8::/64", last: "2001:db8::ff"}
        mtu: 1400
        hooks: clsact
        max_pods: 10
        resync_seconds: 1
        metrics: "[::1]:9000"
        log_level: debug
        paths: {socket: /tmp/s}
        """
    )
    config = load(file)
    assert config == Config(
        network="other",
        ranges=(
            Subnet(subnet=ip_network("192.0.2.0/24"), first="192.0.2.10", last="192.0.2.20"),
            Subnet(subnet=ip_network("2001:db8::/64"), last="2001:db8::ff"),
        ),
        mtu=1400,
        hooks="clsact",
        max_pods=10,
        resync_seconds=1.0,
        metrics="[::1]:9000",
        log_level="debug",
        paths=Paths(socket=Path("/tmp/s")),  # noqa: S108  # never opened
    )
    assert [(each.first, each.last) for each in (subnet.range() for subnet in config.ranges)] == [
        (ip_address("192.0.2.10"), ip_address("192.0.2.20")),
        (ip_address("2001:db8::1"), ip_address("2001:db8::ff")),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mtuu: 1", "mtuu: Extra inputs are not permitted (given: 1)"),
        ("paths: {sokcet: /x}", "paths.sokcet: Extra inputs are not permitted (given: '/x')"),
        ("ranges: [{subnet: 10.0.0.0/8, lats: 10.0.0.1}]", "ranges.0.lats: Extra inputs are not permitted"),
        ("ranges: [{subnet: 169.254.0.0/16}]", "ranges.0: no pod can have an address of 169.254.0.0/16"),
        ("routing: bgp", "routing: Input should be 'auto', 'direct' or 'vxlan' (given: 'bgp')"),
        ("tunnel: {port: 0}", "tunnel.port: Input should be greater than or equal to 1 (given: 0)"),
        ("tunnel: {vni: 16777216}", "tunnel.vni: Input should be less than 16777216 (given: 16777216)"),
        ("tunnel: {vnii: 1}", "tunnel.vnii: Extra inputs are not permitted"),
        ("node_name: ''", "node_name: String should have at least 1 character (given: '')"),
        ("ranges: []", "ranges: give at least one subnet (given: [])"),
        ("ranges: [{}]", "ranges.0.subnet: Field required (given: {})"),
        ("ranges: 10.0.0.0/24", "ranges: Input should be a valid list (given: '10.0.0.0/24')"),
        (
            "ranges: [{subnet: 10.0.0.1/24}]",
            "ranges.0.subnet: 10.0.0.1/24 has host bits set (given: '10.0.0.1/24')",
        ),
        (
            "ranges: [{subnet: 10}]",
            "ranges.0.subnet: '10' does not appear to be an IPv4 or IPv6 network (given: 10)",
        ),
        (
            "ranges: [{subnet: '::ffff:10.0.0.0/120'}]",
            "ranges.0.subnet: ::ffff:a00:0/120 has addresses that mean IPv4 ones (RFC 4291 section 2.5.5.2):"
            " give an IPv4 subnet (given: '::ffff:10.0.0.0/120')",
        ),
        (
            "ranges: [{subnet: 10.0.0.0/24, first: 10.0.1.1}]",
            "ranges.0: first address 10.0.1.1 is not in subnet 10.0.0.0/24 (given: {'first': '10.0.1.1',",
        ),
        (
            "ranges: [{subnet: 10.0.0.0/24, last: nine}]",
            "ranges.0: 'nine' does not appear to be an IPv4 or IPv6 address",
        ),
        (
            "ranges: [{subnet: 10.0.0.0/24}, {subnet: 10.1.0.0/24}, {subnet: 10.0.0.128/25}]",
            "ranges: 10.0.0.0/24 and 10.0.0.128/25 overlap (given: [",
        ),
        ("cluster_cidrs: []", "cluster_cidrs: give at least one prefix, or leave the key out: any may be a node"),
        ("cluster_cidrs: [10.0.0.1/8]", "cluster_cidrs.0: 10.0.0.1/8 has host bits set (given: '10.0.0.1/8')"),
        ("cluster_cidrs: ['::ffff:a00:0/120']", "cluster_cidrs.0: ::ffff:a00:0/120 means IPv4 addresses"),
        (
            "cluster_cidrs: [10.0.0.0/8, 'fd00::/16', 10.244.0.0/16]",
            "cluster_cidrs: 10.0.0.0/8 and 10.244.0.0/16 overlap (given: [",
        ),
        ("cluster_cidrs: ['fd00::/48', 'fd00::/48']", "cluster_cidrs: fd00::/48 and fd00::/48 overlap (given: ["),
        ("network: a/b", r"network: String should match pattern '^[a-zA-Z0-9][a-zA-Z0-9_.\-]*$' (given: 'a/b')"),
        ("mtu: -1", "mtu: Input should be greater than or equal to 0 (given: -1)"),
        ("mtu: 65536", "mtu: Input should be less than or equal to 65535 (given: 65536)"),
        ("mtu: yes", "mtu: Input should be a valid integer (given: True)"),
        ("hooks: xdp", "hooks: Input should be 'auto', 'tcx' or 'clsact' (given: 'xdp')"),
        ("max_pods: 0", "max_pods: Input should be greater than or equal to 1 (given: 0)"),
        ("max_pods: 65537", "max_pods: Input should be less than or equal to 65536 (given: 65537)"),
        ("resync_seconds: 0", "resync_seconds: Input should be greater than 0 (given: 0)"),
        ("resync_seconds: .inf", "resync_seconds: Input should be less than or equal to 3600 (given: inf)"),
        ("resync_seconds: .nan", "resync_seconds: Input should be less than or equal to 3600 (given: nan)"),
        ("metrics: 9815", "metrics: Input should be a valid string (given: 9815)"),
        ("metrics: ':9815'", "metrics: String should match pattern '^.+:[0-9]{1,5}$' (given: ':9815')"),
        ("metrics: 'localhost:65536'", "metrics: the port is above 65535 (given: 'localhost:65536')"),
        ("log_level: loud", "log_level: Input should be 'debug', 'info', 'warning' or 'error' (given: 'loud')"),
        ("paths: {state: 3}", "paths.state: Input is not a valid path"),
        ("1: 2", "1: Keys should be strings (given: 1)"),
    ],
)
def test_what_is_refused(file: Path, text: str, message: str) -> None:
    """A bad value is named with its file and field, what was given, and what is allowed."""
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: {message}")


def test_all_faults_are_told_at_once(file: Path) -> None:
    """Nobody has to correct one line after the other."""
    file.write_text("mtu: -1\nhooks: xdp\n")
    with pytest.raises(ConfigError, match=r"mtu: .*; hooks: "):
        load(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read {file}: "),
        (b"\xff\xfe\xff", "cannot read {file}: "),
        (b"mtu: [", "{file} is not YAML: "),
        (b"\0", "{file} is not YAML: "),
        (b"- mtu\n", "{file} holds a list, allowed are keys with their values"),
        (b"!!python/object/apply:os.getpid []", "{file} is not YAML: "),
    ],
)
def test_files_that_are_no_configuration(file: Path, content: bytes | None, message: str) -> None:
    """A file that is missing, or holds something else, is named."""
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert str(caught.value).startswith(message.format(file=file))


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet="mturangeshok:{}[]-,'\"#&*!|> \n\t01.%@`~", max_size=60))
def test_no_bytes_lead_to_another_exception(tmp_path_factory: pytest.TempPathFactory, content: bytes | str) -> None:
    """Whatever the file holds, it is a configuration or a ConfigError."""
    file = tmp_path_factory.getbasetemp() / "arbitrary.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with suppress(ConfigError):
        assert isinstance(load(file), Config)


def test_nothing_can_be_changed_later() -> None:
    """A configuration is frozen, on all its levels."""
    config = Config()
    for model, field in ((config, "mtu"), (config.paths, "socket"), (config.ranges[0], "first")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(model, field, None)


def test_every_field_is_documented() -> None:
    """Under every field of every model there is a docstring: the file's reference has no gaps."""
    modules = (config, sections)
    models = {
        name: model
        for module in modules
        for name, model in vars(module).items()
        if inspect.isclass(model) and issubclass(model, BaseModel) and model.__module__ == module.__name__
    }
    documented = {
        f"{definition.name}.{field.target.id}"
        for module in modules
        for definition in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(definition, ast.ClassDef)
        for field, following in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
        and isinstance(following.value.value, str)
    }
    fields = {f"{name}.{field}" for name, model in models.items() for field in model.model_fields}
    assert fields == documented
    assert {"Config.mtu", "Masquerade.udp"} <= fields


def test_kubernetes_takes_the_place_of_ranges(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `kubernetes`, all alone or not, the node has no ranges of its own; giving some as well is refused."""
    monkeypatch.setenv("NODE_NAME", "worker-1")
    for text in ("kubernetes: {}", "kubernetes:"):
        file.write_text(text)
        config = load(file)
        assert config.kubernetes is not None
        assert config.own_ranges == ()
        assert config.node_name == "worker-1"
    file.write_text("kubernetes: {}\nranges: [{subnet: 10.0.0.0/24}]")
    with pytest.raises(ConfigError, match="kubernetes takes the place of ranges"):
        load(file)
    monkeypatch.delenv("NODE_NAME")
    assert Config().node_name == socket.gethostname().lower()


def test_the_clusters_prefixes(file: Path) -> None:
    """The own ranges have to be in the cluster's prefixes, where no Kubernetes assigns them."""
    for text in ("ranges: [{subnet: 10.0.0.0/24}]", "kubernetes: {}"):
        file.write_text(f"cluster_cidrs: [10.0.0.0/23]\n{text}")
        assert load(file).cluster_cidrs == (ip_network("10.0.0.0/23"),)
    file.write_text("cluster_cidrs: [10.244.0.0/16]")
    with pytest.raises(ConfigError, match=r"\(10.244.0.0/16\) lack this node's range fd00:10:244::/64"):
        load(file)


def test_kubernetes_takes_the_place_of_nodes(file: Path) -> None:
    """With `kubernetes`, a list of nodes as well is refused."""
    file.write_text("kubernetes: {}\nnodes: [{name: a, addresses: [192.0.2.1]}]")
    with pytest.raises(ConfigError, match="kubernetes takes the place of nodes"):
        load(file)
