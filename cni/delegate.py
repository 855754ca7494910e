"""An IPAM plugin of somebody else's, executed as the specification asks (CNI 1.1.0, section 4: "Plugin Delegation").

It gets the call as it came: the complete configuration on stdin and the same environment but for CNI_COMMAND. What it
answers, error or result, is the answer. It runs in the agent's mount namespace: CNI_PATH must lead somewhere there.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cni.errors import CniError, Code
from cni.result import Result, parse_result
from cni.versions import SINCE, at_least

log = logging.getLogger(__name__)

# A little above what plugins need that ask a server; with ADD's other waits, below the launcher's 60 s. A DEL that
# outlives its launcher (10 s) is spooled, and done again. STATUS is asked every few seconds, and must be quick.
_SECONDS = {"STATUS": 1.5, "VERSION": 1.5}
_OTHER_SECONDS = 30.0
_OUTPUT_LIMIT = 1 << 20  # bytes of each stream
_LOGGED = 2000  # characters of what it says on stderr
_BUSY_TRIES = 50
_BUSY_PAUSE = 0.1  # seconds; five in all, as libcni waits for an executable that is just being installed


class Refusal(CniError):
    """The plugin has answered with an error, or has never run: it has given nothing."""


@dataclass(frozen=True, slots=True)
class Delegate:
    """The plugin `type`, in one of the directories of `path` (CNI_PATH). All methods raise CniError.

    The plugin's own errors come with the code and message that it gave; code 104 if it cannot be executed, does not end
    in time, or says nothing that the specification has.
    """

    type: str
    path: tuple[str, ...]

    def find(self) -> Path:
        """Return the executable: the first regular file of that name (as libcni: executable or not). Code 7, 104."""
        if not self.type or os.sep in self.type:
            raise Refusal(
                Code.INVALID_NETWORK_CONFIG, f'invalid plugin type "{self.type}": allowed is a name without "/"'
            )
        for directory in self.path:
            candidate = Path(directory) / self.type
            if os.path.isfile(candidate):  # noqa: PTH113  # is_file() raises for a name that is too long
                return candidate
        raise Refusal(
            Code.DELEGATE_FAILED,
            f'failed to find plugin "{self.type}" in path [{" ".join(self.path)}]',
            "is CNI_PATH mounted where the agent runs?",
        )

    def add(self, environment: Mapping[str, str], stdin: bytes, version: str) -> Result:
        """Return what the plugin gave; `version` is that of the configuration, for a result that names none."""
        stdout = self._run("ADD", environment, stdin)
        return parse_result(self._object(stdout), version)

    def delete(self, environment: Mapping[str, str], stdin: bytes) -> None:
        """Have the plugin take back what it gave; it succeeds for what is gone."""
        self._run("DEL", environment, stdin)

    def check(self, environment: Mapping[str, str], stdin: bytes) -> None:
        """Have the plugin check what it gave."""
        self._run("CHECK", environment, stdin)

    def gc(self, environment: Mapping[str, str], stdin: bytes) -> None:
        """Have the plugin collect what belongs to no valid attachment.

        One of an older specification has no GC, and says so in whatever words: then there is nothing to forward.
        """
        try:
            self._run("GC", environment, stdin)
        except Refusal as error:
            if not (versions := self._too_old("GC", environment, stdin)):
                raise
            log.info("plugin=%s has no GC, supported versions=%s error=%r", self.type, versions, error.message)

    def status(self, environment: Mapping[str, str], stdin: bytes) -> None:
        """Have the plugin say whether it could serve ADD; one of an older specification could not, in this version."""
        try:
            self._run("STATUS", environment, stdin)
        except Refusal as error:
            if not (versions := self._too_old("STATUS", environment, stdin)):
                raise
            reason = f"the configuration needs CNI version {SINCE['STATUS']}, the plugin supports {versions}"
            raise Refusal(Code.NOT_AVAILABLE, f"IPAM plugin {self.type} cannot serve ADD", reason) from error

    def _too_old(self, command: str, environment: Mapping[str, str], stdin: bytes) -> str:
        """Return the versions that the plugin supports if none of them has the command; empty if that is not so."""
        try:
            answer = self._object(self._run("VERSION", environment, stdin))
        except CniError:
            return ""
        found = answer.get("supportedVersions")
        versions = [each for each in found if isinstance(each, str)] if isinstance(found, list) else []
        try:
            is_too_old = not any(at_least(each, SINCE[command]) for each in versions)
        except ValueError:
            return ""
        return " ".join(versions) if is_too_old else ""

    def _run(self, command: str, environment: Mapping[str, str], stdin: bytes) -> bytes:
        executable = self.find()
        given = {"PATH": os.defpath, **environment, "CNI_COMMAND": command}
        deadline = time.monotonic() + _SECONDS.get(command, _OTHER_SECONDS)
        try:
            status, stdout, stderr = _execute(executable, given, stdin, deadline)
        except (TimeoutError, ValueError) as error:
            raise self._failure(command, str(error)) from error
        except OSError as error:
            raise Refusal(Code.DELEGATE_FAILED, f"cannot execute IPAM plugin {executable}: {error.strerror}") from error
        if stderr:
            log.info("plugin=%s command=%s stderr=%r", self.type, command, _text(stderr)[:_LOGGED])
        if status != 0:
            raise self._refusal(command, status, stdout, stderr)
        return stdout

    def _refusal(self, command: str, status: int, stdout: bytes, stderr: bytes) -> CniError:
        """Return the plugin's own error; without one, what else is known (as libcni puts it)."""
        if not stdout.strip():
            return self._failure(command, f"exit status {status}, and no error on stdout", _text(stderr))
        body = self._object(stdout)
        code, message, details = body.get("code"), body.get("msg"), body.get("details", "")
        if not isinstance(code, int) or isinstance(code, bool) or not isinstance(message, str):
            return self._failure(command, f"exit status {status}, and no error object on stdout", _text(stdout))
        return Refusal(code, message, details if isinstance(details, str) else json.dumps(details))

    def _object(self, stdout: bytes) -> dict[str, Any]:
        try:
            body = json.loads(stdout)
        except (ValueError, RecursionError) as error:
            raise CniError(
                Code.DELEGATE_FAILED, f"IPAM plugin {self.type}: stdout is not JSON", _text(stdout)
            ) from error
        if not isinstance(body, dict):
            raise CniError(Code.DELEGATE_FAILED, f"IPAM plugin {self.type}: stdout is not a JSON object", _text(stdout))
        return body

    def _failure(self, command: str, reason: str, details: str = "") -> CniError:
        return CniError(Code.DELEGATE_FAILED, f"IPAM plugin {self.type} failed at {command}: {reason}", details)


def _execute(
    executable: Path, environment: Mapping[str, str], stdin: bytes, deadline: float
) -> tuple[int, bytes, bytes]:
    """Run it to its end; return exit status, stdout and stderr.

    Raises TimeoutError at the deadline, ValueError for too much output, OSError if it cannot be run. It is dead then,
    with the processes that it started.
    """
    with _file(stdin) as given:
        process = _start(executable, environment, given)
    try:
        stdout, stderr = _collect(process, deadline)
        return process.wait(), stdout, stderr
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        for pipe in _pipes(process):
            pipe.close()


def _start(executable: Path, environment: Mapping[str, str], stdin: int) -> subprocess.Popen[bytes]:
    for _ in range(_BUSY_TRIES):
        try:
            return subprocess.Popen(
                [executable],
                env=environment,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            if error.errno != errno.ETXTBSY:
                raise
            time.sleep(_BUSY_PAUSE)
    raise OSError(errno.ETXTBSY, os.strerror(errno.ETXTBSY), str(executable))


def _collect(process: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, bytes]:
    """Read what it prints until it has ended, and no longer: what it leaves running may hold the pipes open."""
    printed = {pipe: bytearray() for pipe in _pipes(process)}
    with selectors.DefaultSelector() as selector, _pidfd(process.pid) as end:
        for pipe in printed:
            os.set_blocking(pipe.fileno(), False)
            selector.register(pipe, selectors.EVENT_READ)
        selector.register(end, selectors.EVENT_READ)
        ended = False
        while not ended:
            ready = [key.fileobj for key, _ in selector.select(max(0.0, deadline - time.monotonic()))]
            if not ready:
                raise TimeoutError("it did not end in time")
            ended = end in ready
            for pipe in printed if ended else [pipe for pipe in printed if pipe in ready]:
                if _drain(pipe, printed[pipe]) and not ended:
                    selector.unregister(pipe)
    stdout, stderr = printed.values()
    return bytes(stdout), bytes(stderr)


def _drain(pipe: IO[bytes], into: bytearray) -> bool:
    """Read what is there; return whether that was the last. Raises ValueError if it is too much."""
    while True:
        try:
            data = os.read(pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            return True
        into += data
        if len(into) > _OUTPUT_LIMIT:
            raise ValueError(f"it printed more than {_OUTPUT_LIMIT} bytes")


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdout is not None
    assert process.stderr is not None
    return process.stdout, process.stderr


@contextmanager
def _file(content: bytes) -> Iterator[int]:
    """Hold some bytes as an open file, at its beginning: unlike a pipe it needs nobody to keep writing."""
    descriptor = os.memfd_create("stdin")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    """Hold a descriptor that becomes readable when the process has ended (pidfd_open(2), Linux 5.3)."""
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _text(data: bytes) -> str:
    return data.decode(errors="replace").strip()
