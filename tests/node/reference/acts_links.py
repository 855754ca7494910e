"""What goes on between two pods below the addresses that IPAM gave them: other senders, broadcasts, multicasts."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from tests.node.machine import Netns
from tests.node.reference.acts import parse
from tests.node.reference.asking import all_asked, asked
from tests.node.reference.case import Scene, Seen
from tests.node.reference.sides import NODE, WORLD

_PORT, _SECONDS, _TRIES = 7008, 0.2, 2
_FOLLOWING = 8  # tries: podlane follows a change when it hears of it
_GROUP = "224.0.0.251"  # multicast DNS, RFC 6762


def _two(scene: Scene) -> tuple[str, str]:
    a, b = (str(parse(scene.call("ADD", pod)).ips[0].address.ip) for pod in ("a", "b"))
    return a, b


def other_mac(scene: Scene) -> Seen:
    """Another MAC address, that the pod takes by itself."""
    _, b = _two(scene)
    before = bool(asked(scene.pod(), b))
    scene.pod().run("ip", "link", "set", "eth0", "address", "02:00:00:00:77:09")
    scene.pod("b").run("ip", "neigh", "flush", "dev", "eth0")
    return {
        "reaches a pod": before,
        "reaches a pod under another MAC address": bool(asked(scene.pod(), b, tries=_FOLLOWING)),
    }


def other_address(scene: Scene) -> Seen:
    """Another address of its subnet, that the pod takes by itself."""
    _, b = _two(scene)
    scene.pod().run("ip", "address", "add", "10.77.0.200/24", "dev", "eth0")
    return {"reaches a pod under an address that nobody gave it": bool(asked(scene.pod(), b, source="10.77.0.200"))}


def groups(scene: Scene) -> Seen:
    """Datagrams to all pods of the subnet, and to those of a multicast group."""
    _two(scene)
    return {
        "a broadcast reaches the other pod": _heard(scene.pod(), scene.pod("b"), "10.77.0.255", ()),
        "a multicast reaches the other pod": _heard(scene.pod(), scene.pod("b"), _GROUP, (_GROUP,)),
    }


def firewalled(scene: Scene) -> Seen:
    """All that the node would forward is dropped by its firewall."""
    a, b = _two(scene)
    node = scene.side.node
    node.run("iptables", "-P", "FORWARD", "DROP")
    try:
        answers = all_asked(
            {
                "pod reaches pod": (scene.pod(), b),
                "pod reaches the world": (scene.pod(), WORLD[4]),
                "pod reaches the node": (scene.pod(), NODE[4]),
                "world reaches pod": (scene.side.world, a),
            }
        )
        return {name: bool(answer) for name, answer in answers.items()}
    finally:
        node.run("iptables", "-P", "FORWARD", "ACCEPT")


def _heard(sender: Netns, receiver: Netns, to: str, joined: Sequence[str]) -> bool:
    def listen() -> socket.socket:
        it = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        it.settimeout(_SECONDS)
        it.bind(("", _PORT))
        for group in joined:
            index = socket.if_nametoindex("eth0").to_bytes(4, "little")
            it.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + bytes(4) + index)
        return it

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as it:
            it.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            it.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            it.sendto(b"all", (to, _PORT))

    with receiver.call(listen) as listener:
        for _ in range(_TRIES):
            sender.call(send)
            try:
                return bool(listener.recv(100))
            except TimeoutError:
                continue
    return False
