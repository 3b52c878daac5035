"""Errors in four parts: what, the numbers, a hint that works, a stable code; and the exit codes."""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class Exit(IntEnum):
    """Exit codes of every verb."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOTHING_FITS = 3
    STALE = 4
    OUTSIDE = 5
    NEEDS_CONFIRMATION = 6
    INTERRUPTED = 130


MODEL_REFUSED = "model-refused"
"""Code where a library refuses to load a model."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class QplanError(Exception):
    """Something the user can read and act on.

    Args:
        what: one sentence, lower case, without a full stop.
        numbers: the figures behind it, one per line.
        hint: something that works.
        code: a stable identifier in kebab case, for scripts and tests.
    """

    exit_code: ClassVar[Exit] = Exit.FAILED
    default_code: ClassVar[str] = "failed"

    def __init__(self, what: str, *, numbers: str = "", hint: str = "", code: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.numbers = numbers
        self.hint = hint
        self.code = code or self.default_code

    def __str__(self) -> str:
        lines = [f"{self.what} [{self.code}]"]
        lines += [f"  {line}" for line in self.numbers.splitlines()]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class UsageError(QplanError):
    """The command line or a value on it is wrong."""

    exit_code = Exit.USAGE
    default_code = "usage"


class InputError(QplanError):
    """A file, header or answer is missing, malformed or refused."""

    default_code = "bad-input"


class ModelNotFound(QplanError):
    """No catalog entry, file, directory or hub repository has this name."""

    default_code = "unknown-model"


class UnsupportedArchitecture(QplanError):
    """The model is readable, but its architecture has no shape rules here."""

    default_code = "unsupported-architecture"


class DoesNotFit(QplanError):
    """No candidate fits the memory, speed or disk that was asked for."""

    exit_code = Exit.NOTHING_FITS
    default_code = "does-not-fit"


class StalePlan(QplanError):
    """The plan was edited, is for another machine or model, or is of another version."""

    exit_code = Exit.STALE
    default_code = "plan-stale"


class NeedsConfirmation(QplanError):
    """A question must be asked and there is nobody to ask."""

    exit_code = Exit.NEEDS_CONFIRMATION
    default_code = "needs-confirmation"


class ExecutionFailed(QplanError):
    """A step of an apply failed; what it left behind is named."""

    default_code = "step-failed"


class Interrupted(QplanError):
    """A person stopped the work; nothing half-written is left and a rerun goes on."""

    exit_code = Exit.INTERRUPTED
    default_code = "interrupted"


class MissingDependency(QplanError):
    """A package of an extra is needed and not installed; the hint names the extra."""

    default_code = "missing-dependency"


class MissingEnvironment(MissingDependency):
    """An environment of a quantizer is needed and not installed; the hint installs it."""

    def __init__(self, what: str, *, numbers: str = "", hint: str = "", code: str = "", environment: str = "") -> None:
        super().__init__(what, numbers=numbers, hint=hint, code=code)
        self.environment = environment
