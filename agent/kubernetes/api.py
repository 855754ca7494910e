"""Requests to the API server, with the cluster's or a kubeconfig's credentials.

lightkube reads the credentials, and a rotated token again when the server refuses the old one; httpx, which it builds
upon, does HTTPS. lightkube's own list and watch are not used: they keep whole pages and whole objects in memory, and
know no bookmarks.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import httpx2
import msgspec
import yaml
from lightkube.config.client_adapter import Client, ConnectionParams, verify_cluster
from lightkube.config.kubeconfig import SERVICE_ACCOUNT, KubeConfig, SingleConfig
from lightkube.core.exceptions import ConfigError

PatchKind = Literal["merge", "strategic-merge"]

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 30.0
# A peer that is gone without a word is found out within 30 s, though a watch may be silent for minutes.
_KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
)
_CONFLICT, _GONE = 409, 410


class ApiError(Exception):
    """The API server did not do what it was asked for; the message names the request and says why."""


class Conflict(ApiError):
    """The object was changed by somebody else in the meantime."""


class Gone(ApiError):
    """The resource version, or the place in a list, is so old that the server has forgotten it."""


class Api:
    """A connection to the API server. One thread at a time."""

    def __init__(self, kubeconfig: Path | None = None, service_account: Path = Path(SERVICE_ACCOUNT)) -> None:
        """Read the credentials anew: of a kubeconfig, or without one, of the pod's service account. Raises ApiError."""
        with _translated("read the credentials"):
            config = _read_config(kubeconfig, service_account)
            transport = httpx2.HTTPTransport(
                verify=verify_cluster(config.cluster, config.user, config.abs_file),  # type: ignore[arg-type]
                socket_options=_KEEP_ALIVE,
            )
            timeout = httpx2.Timeout(_ANSWER_SECONDS, connect=_CONNECT_SECONDS)
            self._http = Client(config, ConnectionParams(timeout=timeout, transport=transport))

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, path: str, query: Mapping[str, str]) -> bytes:
        """Return what the server answers. Raises ApiError, Gone."""
        return self._request("GET", path, query)

    def patch(self, path: str, patch: Mapping[str, Any], kind: PatchKind) -> None:
        """Change an object. Raises ApiError, Conflict."""
        self._request("PATCH", path, {}, patch, f"application/{kind}-patch+json")

    def create(self, path: str, it: Mapping[str, Any]) -> None:
        """Create an object. Raises ApiError."""
        self._request("POST", path, {}, it, "application/json")

    @contextmanager
    def stream(self, path: str, query: Mapping[str, str], seconds: float) -> Iterator[Iterator[bytes]]:
        """Yield the lines of an answer as they come, the last one after at most so many seconds of silence.

        Raises ApiError and Gone, also while the lines are read.
        """
        timeout = httpx2.Timeout(_CONNECT_SECONDS, read=seconds)
        with (
            _translated(f"GET {path}"),
            self._http.stream("GET", path, params=dict(query), timeout=timeout) as response,
        ):
            if not response.is_success:
                response.read()
                _check(response)
            yield _lines(response.iter_bytes())

    def _request(
        self, method: str, path: str, query: Mapping[str, str], body: Mapping[str, Any] | None = None, kind: str = ""
    ) -> bytes:
        headers = {"Content-Type": kind} if kind else {}
        content = None if body is None else json.dumps(body).encode()
        with _translated(f"{method} {path}"):
            response = self._http.request(method, path, params=dict(query), content=content, headers=headers)
            _check(response)
            return response.content


def _read_config(kubeconfig: Path | None, service_account: Path) -> SingleConfig:
    if kubeconfig is not None:
        config = KubeConfig.from_file(kubeconfig).get()
    elif "KUBERNETES_SERVICE_HOST" not in os.environ:
        raise ApiError("not in a pod (KUBERNETES_SERVICE_HOST is not set): give kubernetes.kubeconfig")
    else:
        config = KubeConfig.from_service_account(service_account).get()
    if config is None or config.user is None:
        raise ApiError(f"{kubeconfig}: the current context names no user")
    return config


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn the libraries' errors into our own: all that a server, a network, or a bad file can do."""
    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, ConfigError, OSError) as error:
        raise ApiError(f"{what}: {error or type(error).__name__}") from error
    except (msgspec.MsgspecError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ApiError(f"{what}: cannot understand it: {error!r}") from error


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of what comes in pieces.

    They end by a newline only: httpx's `iter_lines` splits at what else may end lines in Unicode, and any Node may have
    that in an annotation.
    """
    begun: list[bytes] = []
    for piece in pieces:
        *ends, rest = piece.split(b"\n")
        for end in ends:
            yield b"".join((*begun, end))
            begun.clear()
        begun.append(rest)
    if last := b"".join(begun):
        yield last


def _check(response: httpx2.Response) -> None:
    if response.is_success:  # nor is a redirection an answer: none is followed, for who asks sends a token
        return
    kind = {_CONFLICT: Conflict, _GONE: Gone}.get(response.status_code, ApiError)
    request = response.request
    raise kind(f"{request.method} {request.url.path}: {response.status_code} {_message(response)}")


def _message(response: httpx2.Response) -> str:
    """Return what the server says of a failure: the message of its Status object, if it sent one."""
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase
