"""What llama.cpp itself answers for a model, before a byte of it is downloaded: tensor sizes and memory per device.

A child process writes a file of the model's shapes without weights (``execute/stub.py``), has llama.cpp quantize it in
a dry run, loads the outcome without allocating, and reads llama.cpp's accounts. The formulas need none of this; the
oracle shows whether they still hold as llama.cpp moves.
"""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from planner.core.candidate import Placement, Variant
from planner.core.codec import decode
from planner.core.errors import MissingDependency, QplanError, UsageError
from planner.core.hardware import STRICT
from planner.core.model import ModelSpec
from planner.execute.process import ChildDied, run_child

CHILD = "planner.execute.oracle_child"
TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleQuestion:
    """Size of a variant and, with a placement, memory per device."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    variant: Variant
    placement: Placement | None = None
    gpu_shares: tuple[float, ...] = ()
    """Share of each GPU that the placement uses; empty for a run without any, even where there are some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleRequest:
    """Questions about one model."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    model: ModelSpec
    directory: str
    """Where the files without weights are written."""
    questions: tuple[OracleQuestion, ...]
    accounts: bool = True
    """Read llama.cpp's own accounts out of its memory; without them only its log is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleDevice:
    """What llama.cpp would allocate on one device; ``None`` where it does not tell."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    name: str
    weights_bytes: int | None = None
    kv_cache_bytes: int | None = None
    compute_bytes: int | None = None
    output_bytes: int | None = None
    """Logits of one token per sequence, on the host; from the log, which has two decimals of a MiB."""
    exact: bool = True
    """False where all figures are the log's."""

    @property
    def total_bytes(self) -> int | None:
        """Weights, cache and compute buffer; the output buffer counts as what a runtime adds."""
        parts = (self.weights_bytes, self.kv_cache_bytes, self.compute_bytes)
        return None if None in parts else sum(part or 0 for part in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleAnswer:
    """llama.cpp's answer to one question; ``refused`` in its own words where it has none."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    tensor_bytes: int | None = None
    type_counts: tuple[tuple[str, int], ...] = ()
    """How many tensors have which ggml type."""
    devices: tuple[OracleDevice, ...] = ()
    host: OracleDevice | None = None
    on_cpu_only: bool = False
    """The placement's GPUs are not there: the host is that of a run without any."""
    refused: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleReport:
    """Answers in the order of the questions, and who gave them."""

    __pydantic_config__: ClassVar[dict[str, str]] = STRICT

    tool: str
    """``llama-cpp-python 0.3.36``."""
    gpus: tuple[str, ...]
    """The GPUs that this build of llama.cpp can use here."""
    answers: tuple[OracleAnswer, ...]


def ask(model: ModelSpec, questions: Sequence[OracleQuestion]) -> OracleReport:
    """llama.cpp's answers to ``questions`` about ``model``; takes about a second, needs no weights and no memory.

    Raises:
        MissingDependency: llama-cpp-python is not installed (``missing-dependency``).
        UsageError: a variant is not one of llama.cpp's (``not-gguf``).
        ExecutionFailed: llama.cpp ended the child (``child-died``) or was too slow (``timeout``).
        InputError: the disk cannot hold a sparse file (``not-sparse``).
    """
    require_llama_cpp()
    for question in questions:
        if question.variant.format != "gguf":
            raise UsageError(
                "the oracle is llama.cpp, which knows GGUF types only",
                numbers=f"asked for {question.variant.label()}",
                hint="leave --oracle out, or ask with --method gguf",
                code="not-gguf",
            )
    with tempfile.TemporaryDirectory(prefix="qplan-oracle-") as folder:
        request = OracleRequest(model=model, directory=folder, questions=tuple(questions))
        try:
            return _asked(request)
        except ChildDied as error:
            if error.signal_number != getattr(signal, "SIGSEGV", 11):
                raise
            # another llama.cpp, whose accounts lie elsewhere in memory
            return _asked(OracleRequest(model=model, directory=folder, questions=tuple(questions), accounts=False))


def _asked(request: OracleRequest) -> OracleReport:
    what = f"asking llama.cpp about {request.model.name}"
    log = Path(request.directory) / "oracle.log"
    answer = run_child(CHILD, request, what=what, log=log, timeout_seconds=TIMEOUT_SECONDS)
    return decode(OracleReport, answer, what="the oracle's answer")


def require_llama_cpp() -> None:
    """Refuse where llama-cpp-python is not installed.

    Raises:
        MissingDependency: with the extra to install.
    """
    if find_spec("llama_cpp") is None:
        raise missing("no module named llama_cpp")


def missing(reason: str) -> QplanError:
    """The error for a missing or broken llama-cpp-python."""
    return MissingDependency(
        "the oracle asks llama.cpp, and llama-cpp-python is not usable here",
        numbers=reason,
        hint="`pip install 'qplan[gguf]'`; the formulas answer without it",
    )
