"""JSON documents, read as Go's decoder reads them: runtimes and their users rely on it, by intention or not.

Keys match whatever their case, null is as good as absent, unknown keys are ignored, and a value of the wrong type is an
error. Python's own ideas (NaN, numbers in strings) are not taken over.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

T = TypeVar("T")
Many = Annotated[tuple[T, ...], Field(strict=False)]
"""A JSON list, kept as a tuple (which strict validation would not make of it)."""

_FAULTS = 8  # how many faults of one document are told
_abbreviated = reprlib.Repr()  # what was given may be megabytes, nested a thousand times
_abbreviated.maxstring = 200


def decode(data: bytes) -> dict[str, Any]:
    """Return the JSON object that some bytes hold. Raises ValueError, which says why they hold none.

    Bytes that are no UTF-8 become U+FFFD.
    """
    try:
        value = json.loads(data.decode(errors="replace"), parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object")  # noqa: TRY004  # as of any other bad text
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def lookup(document: Mapping[str, Any], key: str) -> Any:  # noqa: ANN401
    """Return the value of a key, whatever the case it is written in; None if it is absent or null."""
    found = [value for name, value in document.items() if name.casefold() == key.casefold() and value is not None]
    return found[-1] if found else None


def lowered(value: Any, depth: int) -> Any:  # noqa: ANN401
    """Return a JSON value with all keys in lower case and without nulls, down to that many levels of nesting."""
    if depth and isinstance(value, dict):
        return {key.casefold(): lowered(each, depth - 1) for key, each in value.items() if each is not None}
    if depth and isinstance(value, list):
        return [lowered(each, depth - 1) for each in value]
    return value


class JsonObject(BaseModel):
    """A JSON object whose keys are the fields' names in camel case, unless an alias says otherwise."""

    model_config = ConfigDict(alias_generator=to_camel, extra="ignore", frozen=True, strict=True)
    null_means: ClassVar[Mapping[str, object]] = {}
    """For keys where null is not the same as absent: what it stands for."""

    @model_validator(mode="before")
    @classmethod
    def _fold(cls, raw: object) -> object:
        if not isinstance(raw, dict):
            return raw
        aliases = {alias.casefold(): alias for field in cls.model_fields.values() if (alias := field.alias)}
        folded = {}
        for key, value in raw.items():
            alias = aliases.get(key.casefold())
            meant = cls.null_means.get(alias) if alias and value is None else value
            if alias and meant is not None:
                folded[alias] = meant
        return folded


def explain(error: ValidationError) -> str:
    """Say of each field at fault: where it is, what was given, what is allowed."""
    faults = error.errors(include_url=False)
    told = [
        f"{'.'.join(map(str, fault['loc']))}: {_worded(fault['msg'])} (given: {_abbreviated.repr(fault['input'])})"
        for fault in faults[:_FAULTS]
    ]
    more = len(faults) - len(told)
    return "; ".join([*told, f"and {more} more"] if more else told)


def _worded(message: str) -> str:
    return message.removeprefix("Value error, ").replace("valid tuple", "valid list")
