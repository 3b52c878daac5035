"""Rows of data/published_speed.csv as arrays for fitting."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

import numpy as np

from planner.core.data import read_table
from planner.core.devices import hardware_from_device
from planner.estimate.speed_hardware import chip_class, compute_rate, cpu_class, is_ultra
from planner.estimate.speed_model import stratum
from planner.estimate.speed_terms import Case, type_class

HYBRID = re.compile(r"qwen3\.[5-9]|qwen3-next|nemotron|lfm2|falcon-h1")
LOCALSCORE_PROMPT = 800  # mean prompt of its nine tests, 16 to 4096 tokens (https://www.localscore.ai)


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
    """CUDA and ROCm builds before mid-2024, without CUDA graphs and with older kernels."""
    return row["backend"] in ("cuda", "rocm") and row["date"][:7] <= "2024-06" and not re.search("202[56]", row["date"])


def _nuisances(row: dict[str, str]) -> tuple[str, ...]:
    names = [f"nuisance.kind.{row['kind']}"]
    if _old_build(row):
        names.append("nuisance.old_build")
    if row["method"] == "gguf" and row["backend"] == "cuda":
        if _old_build(row):
            names.append("nuisance.launch.old_build")
        if row["kind"] == "localscore":  # a CUDA build of its own, of early 2025
            names.append("nuisance.launch.localscore")
    if row["gpu_count"] not in ("", "1"):
        names.append("nuisance.layer_split")
    return tuple(names)


def _parse(row: dict[str, str]) -> dict[str, object]:
    hardware = hardware_from_device(row["device"], backend=row["backend"] if row["backend"] != "mlx" else "metal")
    gpu = hardware.gpus[0] if hardware.gpus and row["backend"] != "cpu" else None
    chip = chip_class(gpu) if gpu else cpu_class(hardware.cpu)
    params, layers = _number(row["active_params"]), _number(row["n_layer"])
    threads = _number(row["threads"])
    prompt = LOCALSCORE_PROMPT if row["kind"] == "localscore" else _number(row["prompt_tokens"])
    generated = _number(row["generated_tokens"])
    depth = _number(row["depth"]) + (generated / 2 if generated == generated else 64)
    case = Case(
        backend=row["backend"],
        chip=chip,
        type_class=type_class(row["type"]),
        moe=row["moe"] == "1",
        hybrid=bool(HYBRID.search(row["model"])),
        gemma=row["model"].startswith("gemma"),
        ultra=gpu is not None and is_ultra(gpu),
        runtime=row["runtime"],
        method=row["method"],
    )
    return row | {
        "case": case,
        "bandwidth": (gpu.bandwidth_bytes_per_second if gpu else hardware.memory.bandwidth_bytes_per_second),
        "compute": (compute_rate(gpu, chip) if gpu else None),
        "matrix": gpu.fp16_flops_per_second if gpu else None,
        "threads_used": threads if threads == threads else float(hardware.cpu.inference_threads()),
        "all_threads": float(hardware.cpu.inference_threads()),
        "prompt": prompt,
        "deep": depth,
        "width": (params / 12 / layers) ** 0.5,  # hidden size of a Llama-shaped model: 12 * n_embd**2 per layer
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


def make_rows(chosen: list[dict[str, object]], rate: str) -> Rows:
    """``chosen`` as arrays; ``rate`` is the column of tokens per second."""

    def column(name: str) -> np.ndarray:
        return np.array([np.nan if r[name] in (None, "") else float(r[name]) for r in chosen])

    moe = np.array([r["case"].moe for r in chosen])
    x = {
        "weight_bytes": column("read_bytes"),
        "file_bytes": column("file_bytes"),
        "params": column("active_params"),
        "total_params": column("params"),
        "layers": column("n_layer"),
        "bandwidth": column("bandwidth"),
        "compute": column("compute"),
        "matrix": column("matrix"),
        # the tables with a threads column give it for decode; their prompts ran on all cores
        "threads": column("threads_used" if rate.startswith("decode") else "all_threads"),
        "tokens": column("prompt"),
        "kv_bytes": column("kv_bytes_per_token") * column("deep"),
        "depth": column("depth"),
        "width": column("width"),
        "moe": moe,
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
