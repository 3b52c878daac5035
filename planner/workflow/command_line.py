"""The command lines that do the same as what was done in another front end."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from planner.core.workload import Workload

if TYPE_CHECKING:
    from planner.core.candidate import Candidate


def recommend_line(model: str, workload: Workload, profile: str | None) -> str:
    """``qplan recommend MODEL`` with the options that differ from their defaults."""
    return shlex.join(["qplan", "recommend", model, *_options(workload, profile)])


def plan_line(model: str, workload: Workload, profile: str | None, candidate: Candidate, path: Path) -> str:
    """``qplan plan MODEL`` that plans for this very candidate."""
    variant, placement = candidate.variant, candidate.placement
    options = _options(workload, profile, leave_out=("--methods", "--types", "--context", "--kv-type"))
    own = ["--methods", variant.method, "--types", variant.type]
    own += ["--context", str(placement.context), "--kv-type", placement.kv_type]
    return shlex.join(["qplan", "plan", model, *own, *options, "-o", str(path)])


def finetune_line(model: str, workload: Workload, profile: str | None, dataset: Path | None, path: Path) -> str:
    """``qplan plan MODEL --objective finetune`` with what was wished of it."""
    data = [] if dataset is None else ["--dataset", str(dataset)]
    return shlex.join(["qplan", "plan", model, *_options(workload, profile), *data, "-o", str(path)])


def apply_line(path: Path, output: Path) -> str:
    """``qplan apply PLAN --output DIR``."""
    return shlex.join(["qplan", "apply", str(path), "--output", str(output)])


def serve_line(target: Path) -> str:
    """``qplan serve REPORT``."""
    return shlex.join(["qplan", "serve", str(target)])


def _options(workload: Workload, profile: str | None, leave_out: tuple[str, ...] = ()) -> list[str]:
    usual, wish = Workload(), workload.finetuning
    given: dict[str, object] = {
        "--profile": profile,
        "--context": workload.context if workload.context_fixed else None,
        "--objective": _unusual(workload.objective, usual.objective),
        "--min-decode": _number(workload.min_decode_tokens_per_second),
        "--max-memory": workload.max_memory_bytes,
        "--concurrency": _unusual(workload.concurrency, usual.concurrency),
        "--methods": ",".join(workload.methods) if workload.methods else None,
        "--types": ",".join(workload.types) if workload.types else None,
        "--kv-type": workload.kv_type,
        "--gpu-layers": workload.gpu_layers,
        "--prompt-tokens": _unusual(workload.prompt_tokens, usual.prompt_tokens),
        "--threads": workload.threads,
        "--lora-base": wish.base,
        "--lora-rank": wish.rank,
        "--sequence-length": wish.sequence_length,
        "--batch": wish.batch,
        "--micro-batch": wish.micro_batch,
        "--optimizer": wish.optimizer,
        "--learning-rate": _number(wish.learning_rate),
        "--steps": wish.steps,
    }
    kept = {name: value for name, value in given.items() if value is not None and name not in leave_out}
    options = [part for name, value in kept.items() for part in (name, str(value))]
    return [*options, "--cpu-only"] if workload.cpu_only else options


def _unusual(value: object, usual: object) -> object:
    return None if value == usual else value


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"
