"""Rows of data/published_speed.csv as arrays for fitting."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np

from planner import methods
from planner.core.candidate import Placement, Variant
from planner.core.data import read_table
from planner.core.devices import hardware_from_device
from planner.core.model import ModelSpec
from planner.estimate.speed_hardware import (
    chip_class,
    compute_rate,
    cpu_class,
    is_ultra,
    power_ratio,
    served_matrix_rate,
)
from planner.estimate.speed_model import stratum
from planner.estimate.speed_terms import Case, cpu_type_class, served_method, type_class
from planner.estimate.speed_work import Work, attention_operations, work
from planner.methods import gguf, none
from planner.models import catalog
from planner.models.size_model import spec_from_parameters

HYBRID = re.compile(r"qwen3\.[5-9]|qwen3-next|nemotron|lfm2|falcon-h1")
ATTENDING = (("qwen3.", 1 / 4), ("qwen3-next", 1 / 4), ("nemotron", 1 / 8), ("lfm2", 3 / 8))
"""Share of the layers with attention, where the others are recurrent or convolutions (the models' config.json:
Qwen3-Next and 3.5 every fourth, Nemotron 3 Nano 6 of 52 and Super 8 of 88, LFM2 1.2B and 8B-A1B 6 of 16 and 24)."""
LOCALSCORE_PROMPTS = (1024, 4096, 2048, 2048, 1024, 1280, 384, 64, 16)
"""Tokens of the prompts whose rates LocalScore averages (https://www.localscore.ai/about)."""
LOCALSCORE_PROMPT = 1024
"""Their median, where one length stands for them."""


SERVED_SHARE = 0.6
"""Share of the matrix rate that prompts reach in serving runtimes: where ``serving_prefill`` starts."""


@dataclass
class Rows:
    """Measurements of one quantity."""

    seconds: np.ndarray
    weights: np.ndarray
    core: np.ndarray
    eligible: np.ndarray
    devices: list[str]
    cases: list[Case]
    strata: list[str]
    kinds: list[str]
    models: list[str]
    types: list[str]
    sources: list[str]
    nuisances: list[tuple[str, ...]]
    x: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.seconds)

    def take(self, mask: np.ndarray) -> Rows:
        """The rows where ``mask`` is true."""

        def pick(value: object) -> object:
            if isinstance(value, np.ndarray):
                return value[mask]
            if isinstance(value, dict):
                return {k: v[mask] for k, v in value.items()}
            return [v for v, keep in zip(value, mask, strict=True) if keep]

        return Rows(**{f.name: pick(getattr(self, f.name)) for f in fields(self)})


def _number(text: str) -> float:
    return float(text) if text else float("nan")


def _old_build(row: dict[str, str]) -> bool:
    """Builds before mid-2024: no CUDA graphs, older kernels, attention without the flash kernels."""
    return row["date"][:7] <= "2024-06" and not re.search("202[56]", row["date"])


def flash_attention(row: dict[str, str]) -> bool:
    """Whether the row was measured with flash attention: builds before mid-2024 ran without, later ones say so."""
    return row["flash_attention"] not in ("0", "False") and not _old_build(row)


def before_repack(row: dict[str, str]) -> bool:
    """Builds that did not yet interleave these weights for their CPU kernels (Q4_0 from b4140, Q4_K from b4940)."""
    kind = cpu_type_class(row["type"])
    return (kind == "Q4_0" and row["date"] < "2024-11") or (
        row["date"][:4] <= "2024" and kind in ("Q4_K", "IQ4", "Q8_0")
    )


def _nuisances(row: dict[str, str]) -> tuple[str, ...]:
    names = [f"nuisance.kind.{row['kind']}"]
    if _old_build(row):
        names.append("nuisance.old_build")
    if row["method"] == "gguf":
        if _old_build(row):
            names.append("nuisance.launch.old_build")
        if row["kind"] == "localscore":  # a build of its own, of early 2025
            names.append(f"nuisance.launch.localscore.{row['backend']}")
    if row["backend"] == "cpu" and row["kind"] == "community":  # llama-bench, reported by users
        names = []
    if row["backend"] == "cpu" and row["kind"] == "llama-bench" and before_repack(row):
        names.append("nuisance.before_repack")
    if row["gpu_count"] not in ("", "1"):
        names.append("nuisance.layer_split")
    if row["runtime"] == "vllm" and "5c4e69c" in row["source"] and _number(row["prompt_tokens"]) > 8192:
        names.append("nuisance.without_graphs")  # vLLM 0.4.2 captured graphs for contexts of up to 8192 tokens
    if "strix-halo-testing" in row["source"]:  # August 2025, when drivers and kernels for the chip were new
        names.append("nuisance.early_rdna3.5")
    if "15396" in row["source"] and re.search(r"RTX 50|Blackwell", row["device"]):
        names.append("nuisance.before_fp4")
    return tuple(names)


@cache
def _model(name: str, params: float, active: float) -> ModelSpec:
    """The catalog's model of that name, else one of that size: what a user of the tables would get."""
    found = catalog.lookup(name)
    return found or spec_from_parameters(params, active if active < params else None)


_OTHER_NAMES = {
    "MXFP4": "MXFP4_MOE",
    "NVFP4": "MXFP4_MOE",
    "4BIT": "Q4_0",
    "8BIT": "Q8_0",
    "Q2_K_M": "Q2_K",
    "Q6_K_M": "Q6_K",
}
_FLAT_BITS = 0.25  # scales and zero points of EXL2 and like formats, bits per weight


def file_type(name: str) -> str:
    """llama.cpp's name of the file type that a row calls ``name``."""
    return _OTHER_NAMES.get(name.upper(), name.upper())


def _variant(row: dict[str, str]) -> Variant | None:
    """The variant of a row; ``None`` where qplan has no such method."""
    method, type_ = row["method"], row["type"]
    if method == "gguf":
        return gguf.variant(file_type(type_))
    if method == "none":
        return replace(none.variant("f16"), runtime=row["runtime"])
    if method in ("awq", "gptq", "bitsandbytes"):
        made: Variant = methods.get(method).variant(type_, 128)
        return replace(made, runtime=row["runtime"])
    return None


def _load(row: dict[str, str], deep: float, prompt: float) -> Work:
    """What the row's run made the machine do, by the formulas that predict it."""
    model = _model(row["model"], _number(row["params"]), _number(row["active_params"]))
    variant = _variant(row)
    placement = Placement(
        context=8192,
        gpu_layers=model.offloadable_count,
        gpu_count=1,
        depth=round(deep),
        prompt_tokens=round(prompt) if prompt >= 1 else 512,
        ubatch=micro_batch(row),
        flash_attention=flash_attention(row),
    )
    if variant is None:  # EXL2, FP8 and others: the weights of the 16-bit model at their own bits
        load = work(model, replace(none.variant("f16"), runtime=row["runtime"]), placement)
        digits = row["type"].removesuffix("bit")
        bits = float(digits) if re.fullmatch(r"[\d.]+", digits) else 4.0
        bits += 0 if row["method"] == "fp8" else _FLAT_BITS
        return replace(load, gpu_bytes=load.gpu_bytes * bits / 16, streamed_bytes=load.streamed_bytes * bits / 16)
    load = work(model, variant, placement)
    if row["kind"] == "llama-bench" and row["depth"] and float(row["depth"]) > 0:
        # llama-bench reads its prompt on top of the depth
        deep_attention = attention_operations(model, placement.prompt_tokens, float(row["depth"]))
        load = replace(load, attention_operations=deep_attention)
    if catalog.lookup(row["model"]) is None:  # the name still tells what the size does not
        load = replace(load, hybrid=bool(HYBRID.search(row["model"])), gemma=row["model"].startswith("gemma"))
        attending = next((share for name, share in ATTENDING if name in row["model"]), 1.0)
        load = replace(
            load, attention_operations=load.attention_operations * attending, kv_bytes=load.kv_bytes * attending
        )
    return _as_measured(row, model, variant, load)


def _as_measured(row: dict[str, str], model: ModelSpec, variant: Variant, load: Work) -> Work:
    """Files that are larger than their type: gpt-oss with F16 beside its experts, and the widened mixes of Unsloth."""
    if row["kind"] != "llama-bench" or row["method"] != "gguf":
        return load
    extra = _number(row["file_bytes"]) - sum(gguf.tensor_bytes(model, variant))
    if row["model"].startswith("gpt-oss") and variant.type == "MXFP4_MOE" and extra > 5e8:
        return replace(load, gpu_bytes=load.gpu_bytes + extra, streamed_bytes=load.streamed_bytes + extra)
    if not load.moe and catalog.lookup(row["model"]) and extra > 0.04 * load.weight_bytes:
        return replace(load, gpu_bytes=load.gpu_bytes + extra, streamed_bytes=load.streamed_bytes + extra)
    return load


def micro_batch(row: dict[str, str]) -> int:
    """llama-bench of the gpt-oss and DGX Spark tables ran with micro-batches of 2048, the others with the default."""
    wide = row["prompt_tokens"] == "2048" and ("15396" in row["source"] or "dgx-spark" in row["source"])
    return 2048 if wide else 512


def _parse(row: dict[str, str]) -> dict[str, object]:
    hardware = hardware_from_device(row["device"], backend=row["backend"] if row["backend"] != "mlx" else "metal")
    gpu = hardware.gpus[0] if hardware.gpus and row["backend"] != "cpu" else None
    chip = chip_class(gpu) if gpu else cpu_class(hardware.cpu)
    threads = _number(row["threads"])
    prompt = LOCALSCORE_PROMPT if row["kind"] == "localscore" else _number(row["prompt_tokens"])
    generated = _number(row["generated_tokens"])
    deep = (_number(row["depth"]) if row["depth"] else 0.0) + (generated / 2 if generated == generated else 64)
    load = _load(row, deep, prompt)
    case = Case(
        backend=row["backend"],
        chip=chip,
        type_class=(type_class if gpu else cpu_type_class)(row["type"]),
        moe=load.moe,
        hybrid=load.hybrid,
        gemma=load.gemma,
        ultra=gpu is not None and is_ultra(gpu),
        flash=flash_attention(row),
        runtime=row["runtime"],
        method=served_method(row["method"], row["type"]),
    )
    return row | {
        "case": case,
        "load": load,
        "gpu": gpu,
        "hardware": hardware,
        "bandwidth": (gpu.bandwidth_bytes_per_second if gpu else hardware.memory.bandwidth_bytes_per_second),
        "compute": (compute_rate(gpu, chip) if gpu else None),
        "power": (power_ratio(gpu, compute_rate(gpu, chip) or 0.0) if gpu and compute_rate(gpu, chip) else 1.0),
        "matrix": served_matrix_rate(gpu) if gpu else None,
        "threads_used": threads if threads == threads else float(hardware.cpu.inference_threads()),
        "all_threads": float(hardware.cpu.inference_threads()),
        "prompt": prompt,
        # the column says why a prompt's rate is not comparable: a driver that is gone, a prompt from the cache …
        "prefill_tokens_per_second": "" if row["prefill_condition"] else row["prefill_tokens_per_second"],
        "nuisances": _nuisances(row),
    }


def load_rows() -> list[dict[str, object]]:
    """All published rows with their device's figures."""
    return [_parse(row) for row in read_table("published_speed.csv")]


def _cluster_weights(rows: list[dict[str, object]]) -> np.ndarray:
    """Less weight to repeats of one configuration, to crowded devices and to unverified submissions."""
    config: dict[tuple[object, ...], int] = {}
    device: dict[tuple[object, ...], int] = {}
    for r in rows:
        config[key] = config.get(key := (r["device"], r["backend"], r["model"], r["type"]), 0) + 1
        device[key] = device.get(key := (r["device"], r["backend"]), 0) + 1
    out = []
    for r in rows:
        n, m = config[(r["device"], r["backend"], r["model"], r["type"])], device[(r["device"], r["backend"])]
        trust = 1.0 if r["tier"] in ("A", "B") else 0.6
        out.append(trust * (1.0 if r["eligible"] == "1" else 0.6) / n**0.25 / max(1.0, m / 15) ** 0.5)
    return np.array(out)


def _prompt_seconds_per_token(row: dict[str, object]) -> float:
    """What reading the prompt adds to a token where the rate counts the time of both (Qwen's speed benchmarks)."""
    generated = _number(str(row["generated_tokens"]))
    if "speed_benchmark" not in str(row["source"]) or not row["matrix"] or not row["prompt"] > 1 or not generated > 0:
        return 0.0
    load: Work = row["load"]  # type: ignore[assignment]
    operations = 2 * load.params * float(row["prompt"]) + load.attention_operations  # type: ignore[arg-type]
    # long prompts are multiplied in 16 bits, whatever the weights are kept in
    return operations / float(row["matrix"]) / generated  # type: ignore[arg-type]


def make_rows(chosen: list[dict[str, object]], rate: str) -> Rows:
    """``chosen`` as arrays; ``rate`` is the column of tokens per second."""

    def column(name: str) -> np.ndarray:
        return np.array([np.nan if r[name] in (None, "") else float(r[name]) for r in chosen])

    loads: list[Work] = [r["load"] for r in chosen]  # type: ignore[misc]

    def load(name: str) -> np.ndarray:
        return np.array([float(getattr(w, name)) for w in loads])

    x = {
        "weight_bytes": load("weight_bytes"),
        "streamed": load("streamed_bytes"),
        "params": load("params"),
        "output_params": load("output_params"),
        "expert_params": load("expert_params"),
        "expert_rows": load("expert_rows"),
        "layers": load("layers"),
        "kv_bytes": load("kv_bytes"),
        "query_group": load("query_group"),
        "passes": load("passes"),
        "attention": load("attention_operations"),
        "scores": load("attention_scores"),
        "row_elements": load("row_elements"),
        "bandwidth": column("bandwidth"),
        "compute": column("compute"),
        "power": column("power"),
        "matrix": column("matrix"),
        # the tables with a threads column give it for decode; their prompts ran on all cores
        "threads": column("threads_used" if rate.startswith("decode") else "all_threads"),
        "tokens": column("prompt"),
        "mixed": np.array([r["kind"] == "localscore" for r in chosen]),
        "prompt_seconds": np.array([_prompt_seconds_per_token(r) for r in chosen]),
    }
    text = lambda name: [str(r[name]) for r in chosen]  # noqa: E731
    strata = [stratum(r["case"]) for r in chosen]
    return Rows(
        seconds=1 / column(rate),
        weights=_cluster_weights(chosen),
        core=np.array([r["core"] == "1" for r in chosen]),
        eligible=np.array([r["eligible"] == "1" for r in chosen]),
        devices=text("device"),
        cases=[r["case"] for r in chosen],
        strata=strata,
        kinds=text("kind"),
        models=text("model"),
        types=text("type"),
        sources=text("source"),
        nuisances=[r["nuisances"] for r in chosen],
        x=x,
    )
