"""The errors that a CNI plugin may answer with (CNI specification 1.1.0, section 5 "Error")."""

from __future__ import annotations

from enum import IntEnum

_TEXT_LIMIT = 4096  # characters; what is repeated of the input in a message could be more than a reply can hold


class Code(IntEnum):
    """Error codes: 0-99 belong to the specification, the others to podlane."""

    INCOMPATIBLE_VERSION = 1
    UNSUPPORTED_FIELD = 2
    UNKNOWN_CONTAINER = 3
    INVALID_ENVIRONMENT = 4
    IO_FAILURE = 5
    DECODING_FAILURE = 6
    INVALID_NETWORK_CONFIG = 7
    INVALID_NETNS = 8
    TRY_AGAIN_LATER = 11
    NOT_AVAILABLE = 50
    NOT_AVAILABLE_LIMITED = 51
    ALREADY_ATTACHED = 100
    ADDRESSES_EXHAUSTED = 101
    KERNEL_REFUSED = 102
    NOT_AS_ADDED = 103
    DELEGATE_FAILED = 104
    ADDRESS_TAKEN = 105
    INTERNAL = 999


class CniError(Exception):
    """A failure as the runtime shall see it: a code, a message for people, and details such as the value at fault."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        """`code` is one of `Code`, or whatever a delegated plugin answered."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details

    def to_json(self, version: str) -> dict[str, object]:
        """Return the error object, to be printed in the given CNI version (all versions share its form)."""
        body: dict[str, object] = {"cniVersion": version, "code": int(self.code), "msg": _cut(self.message)}
        if self.details:
            body["details"] = _cut(self.details)
        return body


def _cut(text: str) -> str:
    """Return what of a text can be printed: not all of a long one, and U+FFFD for half a surrogate pair."""
    whole = text if len(text) <= _TEXT_LIMIT else text[:_TEXT_LIMIT] + "…"
    return whole.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
