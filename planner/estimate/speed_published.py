"""Published measurements of the very device, model and type: a row beats the formula, corrected for its conditions."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache

from planner.core.data import data_path

_TRUSTED = ("llama-bench", "ollama", "qplan")
_SUFFIX = re.compile(r"-(instruct|chat|it|hf|base|text|2507|2410|2501|v0\.[123])$")
# Same tensor shapes under another name.
_SAME_SHAPE = {
    "llama-3-8b": "llama-3.1-8b",
    "llama-3-70b": "llama-3.1-70b",
    "llama-3.3-70b": "llama-3.1-70b",
    "llama-7b": "llama-2-7b",
    "llama-13b": "llama-2-13b",
    "deepseek-r1-distill-llama-8b": "llama-3.1-8b",
    "deepseek-r1-distill-llama-70b": "llama-3.1-70b",
    "deepseek-r1-distill-qwen-7b": "qwen2.5-7b",
    "deepseek-r1-distill-qwen-14b": "qwen2.5-14b",
    "deepseek-r1-distill-qwen-32b": "qwen2.5-32b",
    "qwen2.5-coder-3b": "qwen2.5-3b",
    "qwen2.5-coder-7b": "qwen2.5-7b",
    "qwen2.5-coder-14b": "qwen2.5-14b",
    "qwen2.5-coder-32b": "qwen2.5-32b",
    "qwen3-coder-30b-a3b": "qwen3-30b-a3b",
    "mistral-7b": "mistral-7b-v0.3",
    "mistral-nemo": "mistral-nemo-12b",
    "deepseek-r1": "deepseek-v3",
}


@dataclass(frozen=True, slots=True)
class Published:
    """One row; the rates are tokens per second, ``None`` where it has none."""

    decode: float | None
    prefill: float | None
    prompt: int
    depth: int
    source: str
    date: str


def shape_name(name: str) -> str:
    """The catalog name of the first model with this shape: ``llama-3.1-8b`` for ``Hermes``-like relatives."""
    short = name.lower().rsplit("/", 1)[-1].removeprefix("meta-")
    while (cut := _SUFFIX.sub("", short)) != short:
        if short in ("mistral-7b-v0.3",):
            break
        short = cut
    return _SAME_SHAPE.get(short, short)


@cache
def _index() -> dict[tuple[str, str, str, str], tuple[Published, ...]]:
    found: dict[tuple[str, str, str, str], list[Published]] = {}
    with data_path("published_speed.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        at = {name: i for i, name in enumerate(next(reader))}
        columns = [at[n] for n in ("device", "backend", "model", "type")]
        for row in reader:
            if not _usable(row, at):
                continue
            a, b, c, d = (row[i] for i in columns)
            found.setdefault((a, b, c, d), []).append(_published(row, at))
    return {key: tuple(rows) for key, rows in found.items()}


def _usable(row: list[str], at: dict[str, int]) -> bool:
    """Benchmarks on one device, wholly on it or on the CPU, of a build after CUDA graphs (mid-2024)."""
    date = row[at["date"]]
    old = row[at["backend"]] in ("cuda", "rocm") and date[:7] <= "2024-06" and not re.search("202[56]", date)
    return (
        row[at["kind"]] in _TRUSTED
        and row[at["core"]] == "1"
        and row[at["stratum"]] != "partial"
        and row[at["gpu_count"]] == "1"
        and not row[at["threads"]]
        and not old
    )


def _published(row: list[str], at: dict[str, int]) -> Published:
    def value(name: str) -> float | None:
        return float(row[at[name]]) if row[at[name]] else None

    generated = value("generated_tokens") or 128.0
    return Published(
        decode=value("decode_tokens_per_second"),
        prefill=None if row[at["prefill_condition"]] else value("prefill_tokens_per_second"),
        prompt=int(value("prompt_tokens") or 0),
        depth=int(value("depth") or 0) + int(generated / 2 if generated > 1024 else 0),
        source=row[at["source"]],
        date=row[at["date"]],
    )


def find(device: str | None, backend: str, model: str, type_: str) -> tuple[Published, ...]:
    """Rows of ``device`` (its name in ``data/devices.csv``), back end, model and GGUF type; empty where none."""
    if device is None:
        return ()
    return _index().get((device, backend, shape_name(model), type_), ())
