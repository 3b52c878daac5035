"""Quantization methods: one row of ``data/methods.toml`` and one module of the same name each.

A method module has a pure half, used for planning:

``variants(model)``
    what the method can make of the model, best known first;
``tensor_bytes(model, variant)``
    bytes of each tensor in the artifact, aligned with ``model.tensors``;
``size(model, variant)``
    bytes on disk;
``blockers(model, variant, hardware)``
    why it cannot run on this machine, empty if it can;
``kernel(model, variant, placement, hardware)``
    the kernel that its matrix products get, or the row of the kernel table that forbids it;
``steps(model, variant)``
    the typed steps that make it;
``commands(model, candidate)``
    text for a person: how to quantize by hand and how to serve.

and a doing half, ``work(job, report)``, which runs only in a child process and imports what it needs.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol, cast

from planner.core.data import named, read_rows

if TYPE_CHECKING:
    from planner.core.candidate import Candidate, KernelUse, Placement, Rejection, Variant
    from planner.core.estimates import SizeEstimate
    from planner.core.hardware import HardwareProfile
    from planner.core.model import ModelSpec
    from planner.core.plan import Step


class Method(Protocol):
    """The pure half of a method module."""

    def variants(self, model: ModelSpec) -> tuple[Variant, ...]:
        """What the method can make of the model."""

    def tensor_bytes(self, model: ModelSpec, variant: Variant) -> tuple[int, ...]:
        """Bytes of each tensor of ``model.tensors`` in the artifact."""

    def size(self, model: ModelSpec, variant: Variant) -> SizeEstimate:
        """Bytes on disk."""

    def blockers(self, model: ModelSpec, variant: Variant, hardware: HardwareProfile) -> tuple[Rejection, ...]:
        """Why the variant cannot run on this machine."""

    def kernel(
        self, model: ModelSpec, variant: Variant, placement: Placement, hardware: HardwareProfile
    ) -> KernelUse | Rejection:
        """The kernel that the variant gets at a placement, or the row that forbids it."""

    def steps(self, model: ModelSpec, variant: Variant) -> tuple[Step, ...]:
        """The typed steps that make the variant."""

    def commands(self, model: ModelSpec, candidate: Candidate) -> dict[str, str]:
        """Text for a person: ``quantize`` and ``serve``, and other ways to run it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodRow:
    """A row of the method table."""

    name: str
    title: str
    summary: str
    calibration_text: str
    executable: bool
    """Whether ``qplan apply`` can carry it out; else the commands are printed for a person."""
    licence: str
    source: str
    date: str


@cache
def rows() -> tuple[MethodRow, ...]:
    """All methods, in the table's order."""
    return read_rows(MethodRow, "methods.toml", "method")


def names() -> tuple[str, ...]:
    """Names of all methods."""
    return tuple(row.name for row in rows())


def row(name: str) -> MethodRow:
    """The table's row of a method.

    Raises:
        UsageError: there is none of this name.
    """
    return named(rows(), name, what="method", code="unknown-method")


@cache
def get(name: str) -> Method:
    """The module of a method.

    Raises:
        UsageError: there is none of this name.
    """
    row(name)
    return cast("Method", importlib.import_module(f"planner.methods.{name}"))
