"""What runtimes do, call by call, where the real ones are not at hand: libcni's callers, containerd, CRI-O, Multus.

Each call is made as the sources of the runtime make it: its environment, its keys, its order.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.node.contract import VERSIONS, WITH_CHECK, Container, Delegate, assert_refused, container, rows
from tests.node.machine import LAUNCHER, Machine, Netns
from tests.node.runtimes import Libcni, Multus, cni_args

versions = pytest.mark.parametrize("version", VERSIONS)
with_check = pytest.mark.parametrize("version", WITH_CHECK)


@pytest.fixture(scope="module")
def node(clean_node: Machine) -> Machine:
    """Share the node among all tests of this module."""
    return clean_node


# libcni


@versions
def test_libcni(it: Container, version: str) -> None:
    """2.1: a list's life by libcni, in each version: VERSION, ADD, CHECK, DEL, and a DEL more, without a cache."""
    libcni = Libcni(it, version, {"ips": True, "mac": True, "portMappings": False})
    assert version in it.call("VERSION", cniVersion=version).json()["supportedVersions"]
    runtime: dict[str, Any] = {
        "ips": ["10.244.0.201/24"],
        "mac": "02:00:00:00:02:01",
        "portMappings": [{"hostPort": 1}],
    }
    result = libcni.add(**runtime)
    assert "10.244.0.201/32" in json.dumps(result)
    assert " 02:00:00:00:02:01 " in it.netns.run("ip", "link", "show", "eth0").stdout
    if version in WITH_CHECK:
        libcni.check(**runtime)
    libcni.delete(**runtime)
    libcni.delete(**runtime)
    assert rows(it.node) == []


@versions
def test_libcni_after_a_failed_add(it: Container, version: str) -> None:
    """2.1: libcni undoes nothing when ADD fails; the DEL that follows has no prevResult, as there is no cache."""
    libcni = Libcni(it, version, {"mac": True})
    assert libcni.call("ADD", mac="01:00:5e:00:00:01").exit_code == 1
    libcni.delete(mac="01:00:5e:00:00:01")
    assert libcni.add()["cniVersion"] == version
    libcni.delete()


def test_libcni_gc(node: Machine) -> None:
    """2.1: libcni sends DEL for what is cached and not valid, then GC with both lists; each of the two is enough."""
    with ExitStack() as stack:
        stays, goes, lost = (stack.enter_context(container(node)) for _ in range(3))
        results = {it.netns.name: it.add() for it in (stays, goes, lost)}
        goes.done("DEL", prevResult=results[goes.netns.name])  # `lost` is in no cache
        valid = [{"containerID": stays.netns.name, "ifname": "eth0"}]
        lists = {"cni.dev/valid-attachments": valid, "cni.dev/attachments": valid}
        assert node.cni("GC", ifname="", config=lists).exit_code == 0
        assert rows(node) == [stays.netns.name]


# containerd


@versions
def test_containerd(it: Container, version: str) -> None:
    """2.2: CNI_ARGS in any order; keys with capital letters; pod annotations and cgroup path; DEL three times.

    The last DEL comes when the namespace is gone, with an empty CNI_NETNS.
    """
    runtime = {
        "dns": {"Servers": ["10.96.0.10"], "Searches": ["shop.svc"], "Options": ["ndots:5"]},
        "cgroupPath": "/kubepods/pod1",
        "io.kubernetes.cri.pod-annotations": {"a": "b"},
        "portMappings": [],
    }
    for seed in range(3):
        pairs = cni_args(it.netns.name)
        random.Random(seed).shuffle(pairs)
        env = {"CNI_ARGS": ";".join(pairs)}
        result = it.add(env=env, cniVersion=version, runtimeConfig=runtime)
        assert result["dns"] == {"nameservers": ["10.96.0.10"], "search": ["shop.svc"], "options": ["ndots:5"]}
        assert "name=shop/web-0" in it.node.log_tail()
        for netns in (str(it.netns.path), str(it.netns.path), ""):
            it.done("DEL", env={**env, "CNI_NETNS": netns}, cniVersion=version, runtimeConfig=runtime)
            assert rows(it.node) == []


@versions
def test_containerd_finds_the_address(it: Container, version: str) -> None:
    """2.2: of the result's addresses each is of the interface that containerd asked for, IPv4 first."""
    result = it.add(cniVersion=version)
    if version in ("0.1.0", "0.2.0"):
        assert list(result)[1:3] == ["ip4", "ip6"]
        return
    assert [result["interfaces"][ip["interface"]]["name"] for ip in result["ips"]] == ["eth0", "eth0"]
    assert [":" in ip["address"] for ip in result["ips"]] == [False, True]


def test_no_words_that_go_cni_swallows(node: Machine) -> None:
    """2.2: no failed DEL has the words by which containerd takes it for a success."""
    delegate = Delegate(node)
    with container(node, ipam=delegate.ipam) as it:
        it.add()
        own = {"CNI_NETNS": str(node.netns.path)}
        failures = [
            it.call("DEL", env={"CNI_PATH": "/nowhere"}),
            it.call("DEL", ipam={"type": "missing"}),
            it.call("DEL", env=own),
            it.call("DEL", cniVersion="9.9.9"),
            it.call("DEL", env={"CNI_IFNAME": ""}),
            it.call("DEL", env={"PODLANE_SOCKET": "/nowhere", "PODLANE_SPOOL": "/dev/null/x"}),
        ]
        delegate.fails("DEL", {"code": 5, "msg": "no"})
        failures.append(it.call("DEL"))
        delegate.fails("DEL", None)
        for failure in failures:
            assert failure.exit_code == 1, failure
            text = failure.stdout.lower()
            assert "not found" not in text
            assert "no such file or directory" not in text


# CRI-O


@with_check
def test_crio(it: Container, version: str) -> None:
    """2.3: CNI_ARGS in their order; ADD, CHECK at once; at the next start of CRI-O CHECK again; then one DEL."""
    env = {"CNI_ARGS": ";".join([*cni_args(it.netns.name), "IgnoreUnknown=1"])}
    runtime = {"cgroupPath": "/kubepods/pod1", "io.kubernetes.cri-o.pod-annotations": {"a": "b"}, "bandwidth": {}}
    given: dict[str, Any] = {"env": env, "cniVersion": version, "runtimeConfig": runtime}
    result = it.add(**given)
    it.done("CHECK", **given, prevResult=result)
    it.node.kill_agent()
    it.node.start_agent()
    it.done("CHECK", **given, prevResult=result)
    assert [ip["address"].count(":") > 0 for ip in result["ips"]] == [
        False,
        True,
    ]  # all become the pod's, in this order
    it.done("DEL", **given, prevResult=result)


def test_crio_starts(it: Container) -> None:
    """2.3: at its start CRI-O validates by VERSION, asks for STATUS until it succeeds, and calls GC (null: no pods)."""
    it.add()
    assert it.call("VERSION").exit_code == 0
    it.done("STATUS", ifname="")
    it.done("GC", ifname="", **{"cni.dev/valid-attachments": None, "cni.dev/attachments": None})
    assert rows(it.node) == []


def test_crio_gives_up(it: Container) -> None:
    """2.3: a DEL with whatever is at the namespace's path is enough: there is at most one in effect."""
    it.add()
    it.netns.delete()
    it.netns.path.touch()
    try:
        it.done("DEL")
    finally:
        it.netns.path.unlink()
    assert not any(it.node.traces().values())


# Multus


NET1: Mapping[str, Any] = {
    "name": "storage",
    "deviceID": "",
    "ipam": {"type": "podlane", "subnet": "10.20.0.0/24", "routes": [{"dst": "172.20.0.0/16"}]},
}


@with_check
def test_multus(it: Container, version: str) -> None:
    """2.4: the master delegate and a second network, with doubled CNI_ARGS; both CHECK, DEL in the opposite order."""
    multus, master = Multus(it), {"cniVersion": version}
    asked = {
        **NET1,
        "cniVersion": version,
        "args": {"cni": {"mac": "02:00:00:00:00:02", "foo": "bar"}},
        "runtimeConfig": {"ips": ["10.20.0.55/24"], "mac": "02:00:00:00:00:03", "infinibandGUID": "", "deviceID": "x"},
    }
    assert multus.call("ADD", "eth0", master).exit_code == 0
    added = multus.call("ADD", "net1", asked, "MAC=02:00:00:00:00:03", "IP=10.20.0.55/24")
    assert added.exit_code == 0, added.stdout
    assert multus.results["net1"]["ips"][0]["address"] == "10.20.0.55/32"
    assert multus.results["net1"]["interfaces"][1]["mac"] == "02:00:00:00:00:03"
    for command in ("CHECK", "DEL"):
        for ifname, network in (("net1", asked), ("eth0", master)):
            outcome = multus.call(command, ifname, network)
            assert (outcome.exit_code, outcome.stdout) == (0, "")
    assert rows(it.node) == []


def test_multus_asks_by_cni_args(it: Container) -> None:
    """2.4: requests come as a comma list in CNI_ARGS, too, with lengths or without."""
    multus = Multus(it)
    dual = {"type": "podlane", "ranges": [[{"subnet": "10.20.0.0/24"}], [{"subnet": "fd20::/64"}]]}
    outcome = multus.call("ADD", "eth0", {"ipam": dual}, "MAC=02:00:00:00:00:04", "IP=10.20.0.77/24,fd20::77")
    assert [ip["address"] for ip in outcome.json()["ips"]] == ["10.20.0.77/32", "fd20::77/128"]
    assert outcome.json()["interfaces"][1]["mac"] == "02:00:00:00:00:04"


@with_check
def test_multus_moves_the_default_route(it: Container, version: str) -> None:
    """2.4: default routes that Multus takes away, out of its cached result too, are not missed by CHECK."""
    multus = Multus(it)
    multus.call("ADD", "eth0", {"cniVersion": version})
    for family, anywhere in (("-4", "0.0.0.0/0"), ("-6", "::/0")):
        it.netns.run("ip", family, "route", "delete", "default")
        result = multus.results["eth0"]
        result["routes"] = [route for route in result["routes"] if route["dst"] != anywhere]
    assert multus.call("CHECK", "eth0", {"cniVersion": version}).exit_code == 0


def test_multus_gives_up_in_the_middle(it: Container) -> None:
    """2.4: when a later network fails Multus deletes those that it has added, and the kubelet begins anew."""
    multus = Multus(it)
    multus.call("ADD", "eth0", {})
    assert_refused(multus.call("ADD", "net1", {**NET1, "vlan": 7}), 2, "vlan")
    for ifname, network in (("net1", NET1), ("eth0", {})):
        assert multus.call("DEL", ifname, network).exit_code == 0
    assert rows(it.node) == []
    assert multus.call("ADD", "eth0", {}).exit_code == 0


def test_multus_gc(it: Container) -> None:
    """2.4: STATUS and GC go to the first network only; the valid ones are those of all networks in Multus' cache."""
    multus = Multus(it)
    multus.call("ADD", "eth0", {})
    multus.call("ADD", "net1", NET1)
    valid = [{"containerID": it.netns.name, "ifname": name} for name in ("eth0", "net1", "net2")]
    assert multus.call("STATUS", "", {}).exit_code == 0
    assert multus.call("GC", "", {"cni.dev/valid-attachments": valid}).exit_code == 0
    assert rows(it.node) == [it.netns.name] * 2
    assert multus.call("DEL", "net1", NET1).exit_code == 0


def test_chrooted(it: Container, tmp_path: Path) -> None:
    """IO7, 2.4: the launcher works chrooted, as thick Multus calls it from its daemon."""
    root = tmp_path / "host"
    root.mkdir()
    variables = {
        "PODLANE_SOCKET": f"{it.node.directory}/cni.sock",
        "CNI_CONTAINERID": it.netns.name,
        "CNI_NETNS": str(it.netns.path),
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(it.node.directory / "bin"),
        "PATH": os.environ["PATH"],
    }
    script = f"mount --rbind / {root} && cd {root} && exec chroot {root} {LAUNCHER}"
    for command in ("ADD", "DEL"):
        done = subprocess.run(
            it.node.netns.command("unshare", "--mount", "--propagation=private", "sh", "-c", script),
            env={**variables, "CNI_COMMAND": command},
            input=json.dumps({"cniVersion": "1.1.0", "name": "podlane", "type": "podlane"}),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done
        assert (command == "ADD") == bool(done.stdout)


# kubelet


def test_kubelet_tries_again(node: Machine) -> None:
    """2.5: after a sandbox that failed comes another container of the pod, while the first is still being deleted."""
    failed, again = Netns("failed"), Netns("again")
    env = {"CNI_ARGS": ";".join(cni_args("x"))}
    try:
        one, two = Container(node, failed), Container(node, again)
        one.add(env=env)
        with ThreadPoolExecutor(3) as pool:
            deleted = [pool.submit(one.call, "DEL", env={**env, "CNI_NETNS": path}) for path in (str(failed.path), "")]
            result = pool.submit(two.add, env=env).result()
            assert [each.result().exit_code for each in deleted] == [0, 0]
        assert rows(node) == [again.name]
        two.done("CHECK", env=env, prevResult=result)
        two.done("DEL", env=env)
        two.done("DEL", env=env)
    finally:
        failed.delete()
        again.delete()
