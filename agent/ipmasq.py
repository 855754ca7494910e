"""The configuration file of ip-masq-agent, as its users have it: which destinations are not masqueraded.

Keys and defaults are those of kubernetes-sigs/ip-masq-agent (v2.12): a key that is left out has its default, an empty
list is an empty list, null is what Go makes of it. Unlike there, an unknown key is an error: a misspelt one would
silently masquerade.
"""

from __future__ import annotations

import logging
from ipaddress import IPv4Network
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from agent.config import ConfigError
from agent.sections import Prefix
from cni.document import explain

log = logging.getLogger(__name__)

# RFC 1918
_PRIVATE = (IPv4Network("10.0.0.0/8"), IPv4Network("172.16.0.0/12"), IPv4Network("192.168.0.0/16"))
# As Go's time.ParseDuration takes it.
_DURATION = r"^[+-]?(0|(([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h))+)$"


class Rules(BaseModel):
    """Which destinations are not masqueraded. In the file, the fields have the names of their aliases."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    non_masquerade: tuple[Prefix, ...] = Field(_PRIVATE, alias="nonMasqueradeCIDRs")
    masq_link_local: Annotated[bool, Field(strict=True)] = Field(False, alias="masqLinkLocal")
    """Masquerade to 169.254.0.0/16."""
    masq_link_local_ipv6: Annotated[bool, Field(strict=True)] = Field(False, alias="masqLinkLocalIPv6")
    """Masquerade to fe80::/10."""
    limit: Annotated[int, Field(strict=True)] = Field(64, alias="cidrLimit")
    """How many prefixes may be given."""
    resync: Annotated[str, Field(strict=True, pattern=_DURATION)] = Field("60s", alias="resyncInterval")
    """Without effect: the file is looked at with every resync of this agent."""

    @model_validator(mode="after")
    def _is_within_limit(self) -> Rules:
        if len(self.non_masquerade) > self.limit:
            raise ValueError(f"{len(self.non_masquerade)} nonMasqueradeCIDRs, but cidrLimit is {self.limit}")
        return self


def parse(text: str) -> Rules:
    """Return the rules in the text of a file, YAML or JSON. Raises ConfigError, which does not name the file."""
    try:
        raw: Any = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates that do not exist, brackets without end
        raise ConfigError(f"neither YAML nor JSON: {error}") from error
    if not isinstance(raw, dict | None):
        raise ConfigError(f"holds a {type(raw).__name__}, allowed are keys with their values")
    given = {key: value for key, value in (raw or {}).items() if value is not None or key == "resyncInterval"}
    if "nonMasqueradeCIDRs" in (raw or {}):
        given.setdefault("nonMasqueradeCIDRs", ())  # null is an empty list, and leaves the booleans as they are
    try:
        return Rules.model_validate(given)
    except ValidationError as error:
        keys = ", ".join(str(field.alias) for field in Rules.model_fields.values())
        raise ConfigError(f"{explain(error)}; the keys are {keys}") from error


class RulesFile:
    """A file that may change at any time. Without the file, the defaults apply."""

    def __init__(self, path: Path) -> None:
        """Read it for the first time. Raises ConfigError if it is there and cannot be used."""
        self._path = path
        self._text = ""  # as good as a file that sets nothing
        self._trouble = ""
        self._rules = Rules()
        self._look()

    def current(self) -> Rules:
        """Return the rules now in force: those of the file, or while that cannot be used, the last ones that could.

        What is wrong with it is logged once.
        """
        try:
            self._look()
            self._trouble = ""
        except ConfigError as error:
            self._tell(str(error))
        return self._rules

    def _look(self) -> None:
        try:
            text = self._path.read_text()
        except FileNotFoundError:
            text = ""
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {self._path}: {error}") from error
        if text == self._text:
            return
        try:
            self._rules = parse(text)
        except ConfigError as error:
            raise ConfigError(f"{self._path}: {error}") from error
        self._text = text
        log.info("not masqueraded file=%s prefixes=%s", self._path, ",".join(map(str, self._rules.non_masquerade)))

    def _tell(self, trouble: str) -> None:
        if trouble != self._trouble:
            log.error("bad ip-masq-agent configuration, the last good one stays in force error=%r", trouble)
        self._trouble = trouble
