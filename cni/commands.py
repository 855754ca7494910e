"""The commands of the CNI contract: what each does, in terms of the node that does it.

`handle` is the whole plugin but for its process: a request in, a reply out, whatever happens.
"""

from __future__ import annotations

import json
import logging
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

from cni.call import Attachment, Call, answer_version, parse
from cni.errors import CniError, Code
from cni.result import Result, parse_result
from cni.wire import Reply, Request

log = logging.getLogger(__name__)


class Node(Protocol):
    """What the commands ask of the agent. Every method may raise CniError.

    The request is the call as it came: what a delegated plugin has to be given.
    """

    def turn(self, attachment: Attachment) -> AbstractContextManager[None]:
        """Wait until no other call is at work on this attachment, and keep others waiting for the time of the block.

        A runtime may give up on an ADD, and go on to DEL, while the node is still at it.
        """

    def refuse_own_netns(self, netns: int, path: str) -> None:
        """Raise CniError 8 if an open network namespace is the node's own."""

    def reserve(self, call: Call, request: Request, netns: int) -> None:
        """Make the attachment known, durably, with its addresses if podlane gives them; refuses one that is known."""

    def connect(self, call: Call, request: Request, netns: int) -> Result:
        """Have a delegate give the addresses, if it is one that does; make the interface; bring its datapath in force.

        `netns` is the open network namespace.
        """

    def commit(self, call: Call, result: Result) -> None:
        """Record what `connect` made as complete: from here on it survives a crash of the agent.

        Refuses addresses that the node must not give any more.
        """

    def release(self, attachment: Attachment, request: Request | None = None) -> None:
        """Take away all that the attachment has, its addresses last; one that is unknown is released already.

        A delegate is called in any case: with the request, or without one as ADD was called.
        """

    def check(self, call: Call, request: Request, netns: int, prev: Result) -> None:
        """Raise CniError if the attachment is not what ADD made, or prevResult says something else."""

    def gc(self, call: Call, request: Request) -> None:
        """Release what is not among the valid attachments of the call's network; the failures come at the end."""

    def status(self, call: Call, request: Request) -> None:
        """Raise CniError 50 or 51 if ADD could not be served now."""


def handle(request: Request, node: Node) -> Reply:
    """Serve one call. Never raises: every failure is a CNI error object."""
    try:
        return Reply(0, _dispatch(parse(request.env, request.stdin), request, node))
    except CniError as error:
        return _failure(error, request)
    except Exception as error:
        log.exception("internal error")
        return _failure(CniError(Code.INTERNAL, f"podlane failed: {error!r}", "see the agent's log"), request)


def _failure(error: CniError, request: Request) -> Reply:
    return Reply(1, json.dumps(error.to_json(answer_version(request.stdin))).encode())


def _dispatch(call: Call, request: Request, node: Node) -> bytes:
    match call.command:
        case "ADD":
            with node.turn(call.attachment):
                return add(call, request, node)
        case "DEL":
            with node.turn(call.attachment):
                delete(call, request, node)
        case "CHECK":
            with node.turn(call.attachment):
                check(call, request, node)
        case "GC":
            node.gc(call, request)
        case "STATUS":
            call.config.check_served()
            node.status(call, request)
    return b""


def add(call: Call, request: Request, node: Node) -> bytes:
    """Attach a container to the network, and return the result as it is printed; on failure nothing of it remains.

    Raises CniError, among others for an attachment that exists (specification: "A runtime should not call ADD twice").
    """
    call.config.check_served()
    if ignored := call.config.without_effect:
        reasons = ", ".join(f"{key} ({reason})" for key, reason in ignored.items())
        log.info("keys of the configuration have no effect pod=%s keys=%r", call.attachment, reasons)
    previous = _previous(call)
    netns = _foreign_netns(call, request, node)
    node.reserve(call, request, netns)
    with ExitStack() as undo:
        undo.callback(_undo, call, request, node)
        result = node.connect(call, request, netns)
        whole = result if previous is None else result.after(previous)
        printed = json.dumps(whole.to_json(call.config.cni_version)).encode()
        node.commit(call, result)
        undo.pop_all()
    return printed


def delete(call: Call, request: Request, node: Node) -> None:
    """Detach the container: by its id and the interface's name, whatever there is of namespace and prevResult."""
    if request.netns is not None and not call.netns_override:
        node.refuse_own_netns(request.netns, call.netns_path)
    node.release(call.attachment, request)


def check(call: Call, request: Request, node: Node) -> None:
    """Compare what there is with what ADD made. Raises CniError, also without prevResult (specification: CHECK)."""
    previous = _previous(call)
    if previous is None:
        raise CniError(Code.INVALID_NETWORK_CONFIG, "Required prevResult missing")
    node.check(call, request, _netns(call, request), previous)


def _undo(call: Call, request: Request, node: Node) -> None:
    """Release quietly: the runtime shall see why ADD failed, and it will call DEL, which tries this again."""
    try:
        node.release(call.attachment, request)
    except Exception as error:
        log.error("undo of ADD failed attachment=%s error=%r", call.attachment, error)


def _previous(call: Call) -> Result | None:
    raw = call.config.prev_result
    return None if raw is None else parse_result(raw, call.config.cni_version)


def _foreign_netns(call: Call, request: Request, node: Node) -> int:
    netns = _netns(call, request)
    if not call.netns_override:
        node.refuse_own_netns(netns, call.netns_path)
    return netns


def _netns(call: Call, request: Request) -> int:
    if request.netns is not None:
        return request.netns
    reason = f"errno {request.netns_errno}"
    raise CniError(Code.INVALID_NETNS, f"cannot open the network namespace: {reason}", call.netns_path)
