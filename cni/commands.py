"""The commands of the CNI contract: what each does, in terms of the node that does it.

`handle` is the whole plugin but for its process: a request in, a reply out, whatever happens.
"""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

from cni.call import LATEST, Attachment, Call, parse
from cni.errors import CniError, Code
from cni.result import Result
from cni.wire import Reply, Request

log = logging.getLogger(__name__)


class Node(Protocol):
    """What the commands ask of the agent. Every method may raise CniError."""

    def turn(self, attachment: Attachment) -> AbstractContextManager[None]:
        """Wait until no other call is at work on this attachment, and keep others waiting for the time of the block.

        A runtime may give up on an ADD, and go on to DEL, while the node is still at it.
        """

    def reserve(self, attachment: Attachment, netns_path: str, netns: int, mtu: int) -> None:
        """Give the attachment its addresses, durably; refuses one that has some already."""

    def connect(self, attachment: Attachment, netns: int) -> Result:
        """Make the interface in the network namespace (an open file) and bring its datapath in force."""

    def commit(self, attachment: Attachment) -> None:
        """Record that the attachment is complete: from here on it survives a crash of the agent."""

    def release(self, attachment: Attachment) -> None:
        """Take away all that the attachment has, the addresses last; one that is unknown is released already."""

    def status(self) -> None:
        """Raise CniError 50 or 51 if ADD could not be served now."""


def handle(request: Request, node: Node) -> Reply:
    """Serve one call. Never raises: every failure is a CNI error object."""
    version = LATEST
    try:
        call = parse(request.env, request.stdin)
        version = call.config.cni_version
        return Reply(0, _dispatch(call, request, node))
    except CniError as error:
        return _failure(error, version)
    except Exception as error:
        log.exception("internal error")
        return _failure(CniError(Code.INTERNAL, f"podlane failed: {error!r}", "see the agent's log"), version)


def _failure(error: CniError, version: str) -> Reply:
    return Reply(1, json.dumps(error.to_json(version)).encode())


def _dispatch(call: Call, request: Request, node: Node) -> bytes:
    match call.command:
        case "ADD":
            with node.turn(call.attachment):
                return json.dumps(add(call, request, node).to_json(call.config.cni_version)).encode()
        case "DEL":
            with node.turn(call.attachment):
                node.release(call.attachment)
        case "STATUS":
            node.status()
    return b""


def add(call: Call, request: Request, node: Node) -> Result:
    """Attach a container to the network; on failure nothing of it remains.

    Raises CniError, among others for an attachment that exists (specification: "A runtime should not call ADD twice").
    """
    _check_served(call)
    netns = _netns(call, request)
    node.reserve(call.attachment, call.netns_path, netns, call.config.mtu)
    with ExitStack() as undo:
        undo.callback(_undo, node, call.attachment)
        result = node.connect(call.attachment, netns)
        node.commit(call.attachment)
        undo.pop_all()
    return result


def _undo(node: Node, attachment: Attachment) -> None:
    """Release quietly: the runtime shall see why ADD failed, and it will call DEL, which tries this again."""
    try:
        node.release(attachment)
    except Exception as error:
        log.error("undo of ADD failed attachment=%s error=%r", attachment, error)


def _check_served(call: Call) -> None:
    """Refuse by name what would otherwise silently not happen."""
    if call.config.ipam:
        raise CniError(
            Code.UNSUPPORTED_FIELD,
            'unsupported field "ipam": podlane gives addresses from the ranges of its agent; remove the field',
            json.dumps(call.config.ipam),
        )
    if call.config.prev_result is not None:
        raise CniError(
            Code.UNSUPPORTED_FIELD, 'unsupported field "prevResult": podlane must be the first plugin of the chain'
        )


def _netns(call: Call, request: Request) -> int:
    if request.netns is not None:
        return request.netns
    reason = f"errno {request.netns_errno}"
    raise CniError(Code.INVALID_NETNS, f"cannot open the network namespace: {reason}", call.netns_path)
