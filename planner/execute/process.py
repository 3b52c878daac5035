"""Heavy work in a child process: cancellable, its memory comes back, and a crash is an exit code.

The child reads one line of JSON on stdin and answers with lines of JSON on stdout: ``{"progress": [...]}`` as often
as it likes, then one ``{"result": …}`` or ``{"error": …}``. Its stderr, and whatever a library prints, goes to a log
file. When its stdin closes the parent is gone, however it died, and the child ends at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, TextIO, TypeVar

import planner
from planner.core import errors
from planner.core.errors import ExecutionFailed, QplanError

T = TypeVar("T")
Progress = Callable[..., None]
"""Called with what the child's progress lines hold, for a step ``(done, total)`` in any unit."""

LOG_LINES_SHOWN = 12
GRACE_SECONDS = 5.0
PARENT_GONE = 70
"""Exit code of a child whose parent died."""
PROGRESS_SECONDS = 0.1
"""Progress of the same work is told at most this often: loading a model reports every tensor."""
PACKAGE_PARENT = Path(str(planner.__file__)).resolve().parents[1]
ALONE = Path(__file__).resolve().with_name("alone")
"""Folder with qplan and no other package, for another interpreter: see the file in it."""


_STOP: ContextVar[threading.Event | None] = ContextVar("stop", default=None)
_LOOK_SECONDS = 0.1


@contextlib.contextmanager
def stoppable(stop: threading.Event | None) -> Iterator[None]:
    """Within it, children that this thread runs are ended, and none is started, once another thread sets ``stop``."""
    token = _STOP.set(stop)
    try:
        yield
    finally:
        _STOP.reset(token)


class ChildDied(ExecutionFailed):
    """A child ended without an answer: killed, crashed, or a bug."""

    default_code = "child-died"

    def __init__(self, what: str, *, numbers: str, hint: str, signal_number: int | None) -> None:
        super().__init__(what, numbers=numbers, hint=hint)
        self.signal_number = signal_number


class Stopped(ChildDied, errors.Interrupted):
    """A child was ended, or not started, because a person stopped the work."""

    exit_code = errors.Exit.INTERRUPTED
    default_code = errors.Interrupted.default_code


def check_stopped() -> None:
    """Go no further where :func:`stoppable`'s event is set.

    Raises:
        Stopped: it is.
    """
    stop = _STOP.get()
    if stop is not None and stop.is_set():
        hint = "start it again: finished steps are kept, and it goes on from there"
        raise Stopped("stopped", numbers="", hint=hint, signal_number=None)


def was_cut_off(error: BaseException) -> bool:
    """Whether ``error`` ended a child in the middle, so that it could not tidy up; else it did so itself."""
    return isinstance(error, ChildDied) or not isinstance(error, QplanError)


def run_child(
    module: str,
    request: object,
    *,
    what: str,
    log: Path,
    progress: Progress | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float | None = None,
    python: Path | None = None,
) -> dict[str, Any]:
    """Run ``python -m module`` on a request and return its result.

    Ctrl-C, any other exception here, the event of :func:`stoppable` and the death of this process end the child.

    Args:
        module: a module of qplan that calls :func:`serve`.
        request: a value of ``planner.core``, or JSON-ready data.
        what: the work in words, for the error.
        log: file for the child's stderr; its last lines are quoted when the child crashes.
        progress: called for every progress line.
        environment: variables added to this process's.
        timeout_seconds: the child is ended after this long.
        python: the interpreter of another environment (:func:`planner.execute.environments.python_for`); this one's
            if ``None``.

    Raises:
        QplanError: what the child raised, of the same class.
        ExecutionFailed: the child crashed, was killed or ran too long.
        Stopped: :func:`stoppable`'s event was set.
    """
    check_stopped()
    late = threading.Event()
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("wb") as log_file,
        _started(module, log_file, environment, _other(python)) as child,
        _timer(child, timeout_seconds, late),
        acting_on_stop(child.kill),
    ):
        answer = _converse(child, request, progress)
        code = child.wait()
    if "result" in answer:
        return dict(answer["result"])
    if "error" in answer:
        raise _same_error(answer["error"], what, log)
    check_stopped()
    if late.is_set():
        raise ExecutionFailed(
            f"{what} took longer than {timeout_seconds:g} s and was ended", numbers=last_lines(log), code="timeout"
        )
    raise crash(what, code, log)


def ask_child(
    kind: type[T],
    module: str,
    request: object,
    *,
    what: str,
    progress: Progress | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float | None = None,
    python: Path | None = None,
) -> T:
    """As :func:`run_child`; the result is of ``kind``, and the log and all temporary files of the child go with it.

    Raises:
        QplanError: as :func:`run_child`.
    """
    from planner.core.codec import decode

    with tempfile.TemporaryDirectory(prefix="qplan-") as folder:
        answer = run_child(
            module,
            request,
            what=what,
            log=Path(folder) / "log",
            progress=progress,
            environment={**(environment or {}), "TMPDIR": folder},
            timeout_seconds=timeout_seconds,
            python=python,
        )
    return decode(kind, answer, what=f"the answer of {what}")


def _other(python: Path | None) -> Path | None:
    """``python`` unless it is this interpreter."""
    return None if python is None or python == Path(sys.executable) else python


@contextlib.contextmanager
def _started(
    module: str, log: IO[bytes], extra: Mapping[str, str] | None, python: Path | None
) -> Iterator[subprocess.Popen[str]]:
    paths = [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")] if python is None else [str(ALONE)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(extra or {})}
    child = subprocess.Popen(
        [str(python or sys.executable), "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        encoding="utf-8",
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the child through us, so that it dies without a traceback
    )
    try:
        yield child
    finally:
        _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    if child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.close()  # the child ends itself when it sees this
    try:
        child.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    if child.stdout is not None:
        child.stdout.close()


@contextlib.contextmanager
def _timer(child: subprocess.Popen[str], seconds: float | None, late: threading.Event) -> Iterator[None]:
    if seconds is None:
        yield
        return

    def stop() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def acting_on_stop(action: Callable[[], object]) -> Iterator[None]:
    """Within it, ``action`` is called from another thread once :func:`stoppable`'s event is set."""
    stop = _STOP.get()
    if stop is None:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            if stop.wait(_LOOK_SECONDS):
                action()
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _converse(child: subprocess.Popen[str], request: object, progress: Progress | None) -> dict[str, Any]:
    """Send the request and read lines until the answer; empty when the child ends without one."""
    from planner.core.codec import canonical_json

    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(canonical_json(request) + "\n")
        child.stdin.flush()
    except BrokenPipeError:
        return {}
    for line in child.stdout:
        try:
            message = json.loads(line)
        except json.JSONDecodeError:
            return {}  # cut off in the middle of a line by its death
        if "progress" not in message:
            return dict(message)
        if progress is not None:
            progress(*message["progress"])
    return {}


def _same_error(described: Mapping[str, str], what: str, log: Path) -> QplanError:
    kind = getattr(errors, described["class"], ExecutionFailed)
    return kind(
        f"{what}: {described['what']}",
        numbers="\n".join(filter(None, (described["numbers"], _complaints(log)))),
        hint=described["hint"],
        code=described["code"],
    )


def _complaints(log: Path) -> str:
    """Lines of the log that say what went wrong: llama.cpp's C interface returns only a null pointer."""
    lines = last_lines(log).splitlines()
    return "\n".join(line for line in lines if "error" in line.lower() or "failed" in line.lower())


def crash(what: str, code: int, log: Path) -> ChildDied:
    """The error for a child that ended by itself with ``code``, with the end of its log."""
    killed = code == -getattr(signal, "SIGKILL", 9)
    return ChildDied(
        f"{what} died: {_cause(code)}",
        numbers=last_lines(log),
        hint="not enough memory is the usual cause; close other programs or plan a smaller context"
        if killed
        else "the lines above are the end of its log",
        signal_number=-code if code < 0 else None,
    )


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"signal {-code}"


def last_lines(log: Path, count: int = LOG_LINES_SHOWN) -> str:
    """The end of a log, for an error message, without llama.cpp's rows of dots."""
    with contextlib.suppress(OSError):
        lines = [line.rstrip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip(" .")]
        return "\n".join(lines[-count:])
    return ""


def serve(work: Callable[[Any, Progress], Any]) -> int:
    """The child's side: read the request, call ``work(request, progress)``, answer; the exit code.

    An error that qplan knows travels as data; anything else leaves its traceback in the log.
    """
    from planner.core.codec import encode

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # nothing a library prints may mix with the answer
    line = sys.stdin.readline()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = work(_parsed(line), _throttled(answers))
    except QplanError as error:
        described = {"what": error.what, "numbers": error.numbers, "hint": error.hint, "code": error.code}
        answers.write(json.dumps({"error": {"class": type(error).__name__, **described}}) + "\n")
        return 1
    answers.write(json.dumps({"result": encode(result)}) + "\n")
    return 0


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise errors.InputError("the request is not JSON", numbers=str(error), code="bad-document") from None


def _throttled(answers: TextIO) -> Progress:
    last_what, last_time = "", 0.0

    def progress(*parts: object) -> None:
        nonlocal last_what, last_time
        what, now = parts[0] if isinstance(parts[0], str) else "", time.monotonic()
        if what != last_what or now - last_time >= PROGRESS_SECONDS or parts[0] == parts[-1]:
            last_what, last_time = what, now
            answers.write(json.dumps({"progress": parts}) + "\n")

    return progress


def _end_with_parent() -> None:
    while sys.stdin.read(1 << 16):
        continue
    os._exit(PARENT_GONE)
