"""Run a server in a child process: ready when it answers, ended with this process."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from planner.core.errors import ExecutionFailed
from planner.execute.process import PACKAGE_PARENT, ChildDied, acting_on_stop, check_stopped, crash, last_lines
from planner.runtimes.service import Command, Server

POLL_SECONDS = 0.1
ANSWER_SECONDS = 5.0
"""A server that is loading may accept a connection and not answer it."""
FIRST_TOKEN_SECONDS = 600.0
GRACE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_OLD_PROGRAM = (
    "unrecognized argument",
    "invalid argument",
    "unknown argument",
    "unexpected argument",
    "no such option",
)
"""What argument parsers say of an option that they do not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A server that answers."""

    url: str
    pid: int
    log: Path


class Stopped(Exception):
    """Somebody asked this process to end the server (SIGTERM)."""


def check_port(host: str, port: int) -> None:
    """Refuse a port that is taken, or an address that is not this machine's.

    Raises:
        ExecutionFailed: ``port-in-use`` or ``bad-address``.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            in_use = error.errno in {errno.EADDRINUSE, errno.EACCES}  # EACCES: a port below 1024
            raise ExecutionFailed(
                f"cannot listen on {host} port {port}",
                numbers=error.strerror or str(error),
                hint="--port 0 takes a free one" if in_use else f"{host} is no address of this machine",
                code="port-in-use" if in_use else "bad-address",
            ) from None


def free_port(host: str) -> int:
    """A port that nobody listens on now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def run(
    command: Command,
    row: Server,
    *,
    host: str,
    port: int,
    log: Path,
    announce: Callable[[Running], None],
    timeout_seconds: float,
    model_name: str | None = None,
) -> None:
    """Start the server, call ``announce`` when it answers, and wait until it or this process is asked to end.

    :func:`~planner.execute.process.stoppable`'s event ends it as well.

    Args:
        host: address that it listens on.
        log: file for all it prints.
        timeout_seconds: it must answer within this.
        model_name: ask for one token of this model before it counts as ready; ``None``: it does so itself.

    Raises:
        ChildDied: it ended by itself, with the last lines of its log.
        ExecutionFailed: ``timeout``.
        Interrupted: the event was set; the server has ended.
        KeyboardInterrupt: Ctrl-C; the server has ended.
    """
    reached = f"[{host}]" if ":" in host else {"0.0.0.0": "127.0.0.1"}.get(host, host)
    url = f"http://{reached}:{port}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        contextlib.suppress(Stopped),
        _asked_to_end(),
        log.open("wb") as file,
        _started(command, file) as child,
        acting_on_stop(lambda: _end(child)),
    ):
        _wait_ready(child, url, row, log, timeout_seconds)
        if model_name is not None:
            _first_token(child, url, model_name, row, log)
        announce(Running(url=url, pid=child.pid, log=log))
        code = child.wait()
        check_stopped()
        if code:
            raise _died(code, row, log)


@contextlib.contextmanager
def _asked_to_end() -> Iterator[None]:
    """SIGTERM ends the server as Ctrl-C does, and this process with success: a service manager asked for it."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Stopped

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _started(command: Command, log: object) -> Iterator[subprocess.Popen[bytes]]:
    paths = [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **dict(command.environment)}
    if command.argv[0] == sys.executable:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    try:
        child = subprocess.Popen(
            command.argv,
            stdin=subprocess.PIPE,
            stdout=log,  # type: ignore[call-overload]
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches it through us, and its workers with it
            preexec_fn=_end_with_parent(),
        )
    except OSError as error:
        raise ExecutionFailed(
            f"{command.argv[0]} cannot be started", numbers=error.strerror or str(error), code="cannot-start"
        ) from None
    try:
        yield child
    finally:
        _end(child)


def _end_with_parent() -> Callable[[], object] | None:
    """For the child to call: ask the kernel for SIGTERM when this thread dies, however it dies (Linux, prctl(2)).

    The library is opened here: between fork and exec of a program with threads nothing may take a lock.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask the server and its workers to end, and make them if they do not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)  # the group outlives a leader that crashed
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    if child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.close()


def _wait_ready(child: subprocess.Popen[bytes], url: str, row: Server, log: Path, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while True:
        ready, code = _answers(url + row.ready), child.poll()
        check_stopped()
        if code is not None:  # and if something answers, it is not this server
            raise _died(code, row, log)
        if ready:
            return
        if time.monotonic() > deadline:
            raise ExecutionFailed(
                f"{row.name} did not answer within {timeout_seconds:g} s",
                numbers=last_lines(log),
                hint=f"--timeout waits longer; its log is {log}",
                code="timeout",
            )
        time.sleep(POLL_SECONDS)


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy of the environment is not asked about this machine."""


def _answers(url: str) -> bool:
    try:
        with _OPENER.open(url, timeout=ANSWER_SECONDS) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False


def _first_token(child: subprocess.Popen[bytes], url: str, model: str, row: Server, log: Path) -> None:
    """One token: llama.cpp's CPU kernels fault, where they do, in the first decode."""
    body = json.dumps({"model": model, "prompt": "1", "max_tokens": 1}).encode()
    asked = urllib.request.Request(url + "/v1/completions", body, {"Content-Type": "application/json"})
    try:
        with _OPENER.open(asked, timeout=FIRST_TOKEN_SECONDS):
            return
    except (OSError, urllib.error.URLError) as error:
        check_stopped()
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise _died(child.wait(GRACE_SECONDS), row, log) from None
        raise ExecutionFailed(
            f"{row.name} answers, but not with a token", numbers=f"{error}\n{last_lines(log)}", code="no-token"
        ) from None


def _died(code: int, row: Server, log: Path) -> ChildDied:
    """The death of a server, with a hint where its log has one."""
    error = crash(row.name, code, log)
    lines = error.numbers.lower()
    if any(words in lines for words in _OLD_PROGRAM):
        error.hint = f"qplan gives it the options of {row.version}; this program is of another version"
    elif "out of memory" in lines or "failed to allocate" in lines:
        error.hint = "a smaller --context, fewer --gpu-layers or a smaller type needs less memory"
    else:
        error.hint = f"{error.hint}; all of it: {log}"
    return error
