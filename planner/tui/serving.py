"""The server of a result, in a thread: what is known of it is one value, told in messages to the app."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from textual.message import Message

from planner.core.errors import Interrupted, QplanError

if TYPE_CHECKING:
    from planner.workflow.serving import Prepared

PREPARING, STARTING, ANSWERS, STOPPING, STOPPED, FAILED = (
    "preparing", "starting", "answers", "stopping", "stopped", "failed",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A server and how far it is."""

    target: Path
    phase: str = PREPARING
    server: str = ""
    model: str = ""
    """What its API calls the model."""
    command: str = ""
    url: str = ""
    log: Path | None = None
    notes: tuple[str, ...] = ()
    error: QplanError | None = None

    @property
    def alive(self) -> bool:
        """Whether there is, or soon will be, a process."""
        return self.phase in {PREPARING, STARTING, ANSWERS, STOPPING}


class ServingChanged(Message):
    """The server is further, or gone."""

    def __init__(self, serving: Serving) -> None:
        super().__init__()
        self.serving = serving


class StartWanted(Message):
    """Serve this report."""

    def __init__(self, target: Path) -> None:
        super().__init__()
        self.target = target


class StopWanted(Message):
    """End the server."""


def serve(target: Path, post: Callable[[Message], object], stop: threading.Event) -> None:
    """Serve ``target`` until ``stop`` is set or the server dies. ``post`` may be called from any thread."""
    from planner.workflow import serving
    from planner.workflow.serve_target import Options

    now = Serving(target=target)

    def told(**changes: object) -> None:
        nonlocal now
        now = replace(now, **changes)  # type: ignore[arg-type]
        post(ServingChanged(now))

    told()
    try:
        prepared = serving.prepare(target, Options(port=serving.usual_port()), to_run=True)
        told(**_known(prepared))
        serving.start(
            prepared,
            lambda running: told(phase=ANSWERS, url=f"{running.url}/v1"),
            lambda note: told(notes=(*now.notes, note)),
            stop=stop,
        )
        told(phase=STOPPED)
    except Interrupted:
        told(phase=STOPPED)
    except QplanError as error:
        told(phase=FAILED, error=error)


def _known(prepared: Prepared) -> dict[str, object]:
    from planner.workflow import serving

    return {
        "phase": STARTING,
        "server": prepared.server.name,
        "model": prepared.model or "",
        "command": prepared.command.text(),
        "notes": prepared.notes,
        "log": serving.log_path(prepared),
    }
