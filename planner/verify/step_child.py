"""``python -m planner.verify.step_child``: carry out a step that measures the model through llama.cpp."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from planner.core.codec import canonical_json, decode
from planner.core.errors import InputError
from planner.core.job import Job
from planner.core.plan import BUILT_IN, MATRIX, CalibrationSource
from planner.execute import calibration as texts
from planner.execute import domains
from planner.execute.process import Progress, serve
from planner.execute.resident import peak_resident_bytes

_ADDITIVE = 0.12
"""Of ln(additivity): 0.03 at most with texts of the models' own kind, up to 0.28 with others (``benchmarks/budget.py``,
three models, 2026-11-26)."""


def work(request: object, progress: Progress) -> dict[str, Any]:
    """An ``imatrix`` or ``sensitivity`` step; the answer holds the peak memory and what it used and found."""
    from planner.verify import native

    native.library()  # before numpy, see planner.verify.quality
    job = decode(Job, request, what="the job")
    kinds = {"imatrix": _imatrix, "sensitivity": _sensitivity}
    if job.step.kind not in kinds:
        raise InputError(f"{job.step.kind!r} is no step that measures", code="unknown-step")
    return {**kinds[job.step.kind](job, progress), "peak_memory_bytes": peak_resident_bytes()}


def _calibration(job: Job) -> CalibrationSource:
    if job.step.calibration is None:
        raise InputError(f"the step {job.step.name!r} names nothing to calibrate with", code="bad-plan")
    return job.step.calibration


def _imatrix(job: Job, progress: Progress) -> dict[str, Any]:
    """Collect a matrix, or take the user's after a look at whether it is of this model."""
    from planner import models
    from planner.convert.write import atomic_output
    from planner.formats.imatrix import check_fits, read_imatrix, write_imatrix
    from planner.verify import native
    from planner.verify.importance import collect, summary
    from planner.verify.kept import KeptSums, kept_path, key_of

    chosen, kept = _calibration(job), None
    if chosen.kind == MATRIX:
        matrix = read_imatrix(texts.matrix_path(chosen))
    else:
        text = texts.text(chosen)
        settings = {"chunks": chosen.chunks, "seed": chosen.seed, "outputs": job.step.outputs, "threads": job.threads}
        key = key_of(Path(job.source), text, gpu_layers=job.step.gpu_layers, **settings)
        kept = KeptSums(kept_path(Path(job.output)), key)
        matrix = collect(
            Path(job.source),
            text,
            dataset=texts.described(chosen),
            threads=job.threads,
            offload=native.Offload(gpu_layers=job.step.gpu_layers),
            most_chunks=chosen.chunks,
            seed=chosen.seed,
            outputs=job.step.outputs,
            progress=lambda _, fraction: progress(fraction, 1.0),
            kept=kept,
        )
    covered = check_fits(matrix, models.resolve(job.source).tensors, Path(chosen.location))
    with atomic_output(Path(job.output)) as partial:
        write_imatrix(partial, matrix)
    if kept:
        kept.forget()
    found = summary(matrix)
    notes = [
        f"importance of {covered} tensors from {found['tokens']} tokens of {found['dataset'] or 'an unnamed text'}"
    ]
    if found["experts_unseen"]:
        notes.append(f"{found['experts_unseen']} experts got no token; they are quantized without importance")
    if chosen.kind != MATRIX:
        notes.append(domains.warning(general=chosen.kind == BUILT_IN))
    details = {**found, "seed": chosen.seed, "text_sha256": chosen.sha256}
    return {"notes": notes, "details": details, "resumed": bool(kept and kept.resumed)}


def _sensitivity(job: Job, progress: Progress) -> dict[str, Any]:
    from planner.convert.write import atomic_output
    from planner.formats.imatrix import read_imatrix
    from planner.models.fingerprint import sha256_of
    from planner.verify import native
    from planner.verify.kept import KeptRows, kept_path, key_of
    from planner.verify.sensitivity import Settings, measure

    chosen, text = _calibration(job), texts.text(_calibration(job))
    settings = {"probes": job.step.probes, "chunks": chosen.chunks, "seed": chosen.seed, "threads": job.threads}
    matrix = sha256_of(Path(job.imatrix)) if job.imatrix else None
    key = key_of(Path(job.source), text, gpu_layers=job.step.gpu_layers, matrix=matrix, **settings)
    kept = KeptRows(kept_path(Path(job.output)), key)
    table = measure(
        Path(job.source),
        text,
        read_imatrix(Path(job.imatrix)) if job.imatrix else None,
        Settings(
            threads=job.threads,
            offload=native.Offload(gpu_layers=job.step.gpu_layers),
            probes=job.step.probes,
            chunks=chosen.chunks,
            seed=chosen.seed,
        ),
        progress=lambda _, fraction: progress(fraction, 1.0),
        kept=kept,
    )
    with atomic_output(Path(job.output)) as partial:
        partial.write_text(canonical_json(table) + "\n", encoding="utf-8")
    kept.forget()
    details = {"probes": len(table.probes), "tokens": table.tokens, "seed": table.seed, "text_sha256": chosen.sha256}
    notes = [
        f"sensitivity of {len(table.tensors)} tensors from {len(table.probes)} probes of {table.tokens} tokens each"
    ]
    if table.additivity is not None:
        details["additivity"] = round(table.additivity, 4)
        notes += _additivity_notes(table.additivity)
    return {"notes": notes, "details": details, "resumed": kept.resumed}


def _additivity_notes(additivity: float) -> list[str]:
    """A word where parts do not add up as they do on a text of the model's own kind."""
    if additivity > 0 and abs(math.log(additivity)) <= _ADDITIVE:
        return []
    return [
        f"all parts together lose {additivity:.2f} times what they lose one by one; about 1 is usual: the text may be "
        "unlike what the model was trained on, and one that is like it, with --calibration, chooses better"
    ]


if __name__ == "__main__":
    raise SystemExit(serve(work))
