"""Who reaches whom, and under which address: a listener in every namespace that tells its askers who they are."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address

from tests.node.machine import Netns

PORT = 7007
_SECONDS = 0.3
_TRIES = 2  # of a machine whose queues overflow now and then


class Listeners:
    """One thread that answers in all of them. It holds the namespaces, not their addresses, which come and go."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Listeners:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def listen(self, netns: Netns) -> None:
        """Listen at all addresses that a namespace has now or later."""
        made: socket.socket = netns.call(
            lambda: socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
        )
        made.setblocking(False)
        self._selector.register(made, selectors.EVENT_READ)

    def _serve(self) -> None:
        while not self._stop.is_set():
            for key, _ in self._selector.select(timeout=0.05):
                assert isinstance(key.fileobj, socket.socket)
                try:
                    connection, peer = key.fileobj.accept()
                except OSError:  # it gave up
                    continue
                with connection:
                    connection.sendall(peer[0].removeprefix("::ffff:").encode())


def asked(netns: Netns, address: str, *, source: str = "", tries: int = _TRIES) -> str:
    """Return the address under which the namespace reaches a listener; empty if it does not reach it."""
    family = socket.AF_INET if ip_address(address).version == 4 else socket.AF_INET6

    def ask() -> str:
        for _ in range(tries):
            with socket.socket(family, socket.SOCK_STREAM) as it:
                it.settimeout(_SECONDS)
                try:
                    if source:
                        it.bind((source, 0))
                    it.connect((address, PORT))
                    return it.recv(100).decode()
                except TimeoutError:
                    continue
                except OSError:
                    return ""
        return ""

    answer: str = netns.call(ask)
    return answer


def all_asked(askers: Mapping[str, tuple[Netns, str]]) -> dict[str, str]:
    """Return what `asked` says of each namespace and address, by name; all at once, as some wait in vain."""
    with ThreadPoolExecutor(len(askers) or 1) as pool:
        return dict(zip(askers, pool.map(lambda asker: asked(*asker), askers.values()), strict=True))
