"""Values as the JSON documents of the public contract. Keys are added, never renamed."""

from __future__ import annotations

from typing import Any

from planner import FORMAT_VERSION, methods
from planner.core.candidate import Candidate, KernelUse
from planner.core.codec import encode
from planner.core.estimates import (
    DeviceMemory,
    Estimate,
    MemoryEstimate,
    Prediction,
    QualityEstimate,
    SizeEstimate,
    SpeedEstimate,
)
from planner.core.hardware import HardwareProfile
from planner.core.model import ModelSpec
from planner.core.plan import Step, disk_peak_bytes
from planner.workflow.recommend import Recommendation

SIGNIFICANT = 6


def rounded(value: float | None) -> float | None:
    """Six significant digits: more would be noise, fewer would show in ratios near 1."""
    return None if value is None else float(f"{value:.{SIGNIFICANT}g}")


def recommendation_document(answer: Recommendation) -> dict[str, Any]:
    """What ``qplan recommend --json`` prints."""
    decision = answer.decision
    chosen = decision.chosen
    return {
        "format_version": FORMAT_VERSION,
        "model": model_document(answer.model),
        "hardware": hardware_document(answer.hardware),
        "workload": encode(answer.workload),
        "chosen": _with_making(chosen, answer) if chosen else None,
        "alternatives": [_with_making(c, answer) for c in decision.alternatives],
        "rejected": [encode(rejection) for rejection in decision.rejected],
        "trace": [encode(entry) for entry in decision.trace],
        **_finetuning(answer),
    }


def _finetuning(answer: Recommendation) -> dict[str, Any]:
    """The key ``finetuning`` of that objective."""
    if answer.finetuning is None:
        return {}
    from planner.workflow import finetuning

    return {"finetuning": finetuning.document(answer.finetuning)}


def _with_making(candidate: Candidate, answer: Recommendation) -> dict[str, Any]:
    """A candidate and what making it takes on the machine."""
    from planner.estimate.making import forecast

    made = forecast(answer.model, candidate.variant, answer.hardware, threads=candidate.placement.threads)
    return {**candidate_document(candidate, answer.model), "making": making_document(made)}


def making_document(steps: tuple[Step, ...]) -> dict[str, Any]:
    """Time, memory and disk of the steps that make an artifact; ``null`` where nothing sourced is known."""
    listed = [
        {
            "step": step.name,
            "method": step.method,
            "type": step.type,
            "output_bytes": step.predicted_bytes,
            "scratch_bytes": step.predicted_scratch_bytes,
            "seconds": _prediction(step.predicted_seconds),
            "peak_memory_bytes": _prediction(step.predicted_memory),
            "gpu_peak_memory_bytes": _prediction(step.predicted_gpu_memory),
        }
        for step in steps
        if step.kind != "verify"
    ]
    makers = tuple(step for step in steps if step.kind != "verify")
    return {"steps": listed, "disk_peak_bytes": disk_peak_bytes(makers)}


def _prediction(prediction: Prediction | None) -> dict[str, Any] | None:
    if prediction is None:
        return None
    ends = {"value": prediction.value, "low": prediction.low, "high": prediction.high}
    shown = {name: rounded(value) for name, value in ends.items()}
    return {**shown, "basis": prediction.basis, "source": prediction.source}


def model_document(model: ModelSpec) -> dict[str, Any]:
    """A model without its tensor list."""
    return {
        "name": model.name,
        "architecture": model.architecture,
        "family": model.family,
        "parameters": model.parameter_count,
        "active_parameters": model.active_parameter_count,
        "layers": model.n_layer,
        "embedding_length": model.n_embd,
        "heads": model.n_head,
        "kv_heads": model.n_head_kv,
        "vocabulary": model.n_vocab,
        "trained_context": model.n_ctx_train,
        "tied_embeddings": model.tied_embeddings,
        "dtype": model.dtype,
        "source": {key: value for key, value in encode(model.source).items() if key != "files"},
        "notes": list(model.notes),
    }


def hardware_document(hardware: HardwareProfile) -> dict[str, Any]:
    """A machine with its identity."""
    return {**encode(hardware), "identity": hardware.identity()}


def candidate_document(candidate: Candidate, model: ModelSpec) -> dict[str, Any]:
    """One candidate with its predictions, reasons and commands."""
    variant, placement = candidate.variant, candidate.placement
    return {
        **encode(variant),
        **{k: v for k, v in encode(placement).items() if k not in {"depth", "prompt_tokens"}},
        **estimate_document(candidate.estimate),
        "executable": methods.row(variant.method).executable,
        "score": candidate.score,
        "pareto": candidate.pareto,
        "reasons": list(candidate.reasons),
        "kernel": kernel_document(candidate.kernel) if candidate.kernel else None,
        "commands": methods.get(variant.method).commands(model, candidate),
    }


def kernel_document(kernel: KernelUse) -> dict[str, Any]:
    """The kernel of a candidate, with what to do about a slow one."""
    named = {"id": kernel.id, "name": kernel.name, "speed": kernel.speed, "text": kernel.text}
    fix = {"fix": kernel.fix} if kernel.speed != "fast" else {}
    return {**named, **fix, "version": kernel.version, "source": kernel.source}


def estimate_document(estimate: Estimate) -> dict[str, Any]:
    """The size, memory, speed and quality blocks of the contract."""
    return {
        **size_document(estimate.size),
        "memory": memory_document(estimate.memory),
        "speed": speed_document(estimate.speed),
        "quality": quality_document(estimate.quality),
    }


def size_document(size: SizeEstimate) -> dict[str, Any]:
    """Bytes on disk."""
    return {
        "tensor_bytes": size.tensor_bytes,
        "file_bytes": size.file_bytes,
        "bits_per_weight": rounded(size.bits_per_weight),
    }


def memory_document(memory: MemoryEstimate) -> dict[str, Any]:
    """Memory per device and of the host."""
    block: dict[str, Any] = {
        "devices": [device_document(device) for device in memory.devices],
        "host": device_document(memory.host),
    }
    if memory.notes:
        block["notes"] = list(memory.notes)
    return block


def device_document(device: DeviceMemory) -> dict[str, Any]:
    """Memory of one device."""
    return {
        "name": device.name,
        "weights_bytes": device.weights_bytes,
        "kv_cache_bytes": device.kv_cache_bytes,
        "compute_bytes": device.compute_bytes,
        "overhead_bytes": device.overhead_bytes,
        "total_bytes": device.total_bytes,
        "reclaimable_bytes": device.reclaimable_bytes,
        "capacity_bytes": device.capacity_bytes,
    }


def speed_document(speed: SpeedEstimate) -> dict[str, Any]:
    """Decode and prefill with their 80 % intervals."""
    basis = speed.decode or speed.prefill
    return {
        **_ranged("decode_tokens_per_second", "decode", speed.decode),
        **_ranged("prefill_tokens_per_second", "prefill", speed.prefill),
        "basis": basis.basis if basis else None,
        "bound_by": speed.bound_by,
        "source": basis.source if basis else None,
        "prefill_basis": speed.prefill.basis if speed.prefill else None,
        "prefill_source": speed.prefill.source if speed.prefill else None,
        "notes": list(speed.notes),
    }


def _ranged(name: str, prefix: str, prediction: Prediction | None) -> dict[str, float | None]:
    low, high = (prediction.low, prediction.high) if prediction else (None, None)
    value = prediction.value if prediction else None
    return {name: rounded(value), f"{prefix}_low": rounded(low), f"{prefix}_high": rounded(high)}


def quality_document(quality: QualityEstimate) -> dict[str, Any]:
    """Perplexity ratio and KL divergence with their 80 % intervals."""
    ratio, divergence = quality.perplexity_ratio, quality.kl_divergence_nats
    return {
        "perplexity_ratio": rounded(ratio.value) if ratio else None,
        "low": rounded(ratio.low) if ratio else None,
        "high": rounded(ratio.high) if ratio else None,
        "kl_divergence_nats": rounded(divergence.value) if divergence else None,
        "kl_divergence_low": rounded(divergence.low) if divergence else None,
        "kl_divergence_high": rounded(divergence.high) if divergence else None,
        "basis": ratio.basis if ratio else None,
        "source": ratio.source if ratio else None,
        "notes": list(quality.notes),
    }
