"""Write data/type_noise.csv: the error that each quantization type makes on normally distributed weights.

The relative squared error E[(w - q(w))**2] / E[w**2] orders all types on one axis, those nobody published a perplexity
of too. ggml's types are quantized by ggml's own code (the library inside llama-cpp-python), the others as their papers
say. With an importance matrix the error is weighted by the importances, here log-normal over the columns.

    python benchmarks/type_noise.py        needs llama-cpp-python, gguf and numpy; half a minute
"""

from __future__ import annotations

import csv
import ctypes
import datetime
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, quants

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from planner.core.data import data_path, read_table

ROWS, COLUMNS, SEED = 128, 4096, 0
IMPORTANCE_SIGMA = 1.0  # of ln(importance) over the columns: activations' second moments span about two decades
LEFT_OUT = {
    "Q8_1",
    "Q8_K",
    "NVFP4",
    "TQ1_0",
    "TQ2_0",
    "Q1_0",
    "Q2_0",
}  # activations only, or only for models made for it
DEMAND_IMATRIX = {"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M"}
GROUPS = (16, 32, 64, 128, 256, 512, 1024, -1)
# bitsandbytes' code books, csrc/kernels.cu; NF4: Dettmers et al. 2023, arXiv:2305.14314, appendix E
NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
FP4 = tuple(sign * v for sign in (-1, 1) for v in (0.0, 0.00520833, 0.16666667, 0.25, 0.33333333, 0.5, 0.66666667, 1.0))
BLOCK_64 = 64  # bitsandbytes' default block of 4-bit types
FP8_LARGEST = 448.0

Array = np.ndarray


def relative_error(weights: Array, made: Array, importance: Array | None = None) -> float:
    """Squared error over squared weights, columns weighted by ``importance``."""
    weight = 1.0 if importance is None else importance
    return float((weight * (made - weights) ** 2).sum() / (weight * weights**2).sum())


def ggml() -> ctypes.CDLL:
    """The library with ggml's quantizers."""
    found = importlib.util.find_spec("llama_cpp")
    root = Path(str(found.origin)).parent if found else Path()
    library = ctypes.CDLL(str(next(p for p in root.rglob("*ggml-base*") if p.suffix in (".so", ".dylib", ".dll"))))
    library.ggml_quantize_chunk.restype = library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 2,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


def through_ggml(library: ctypes.CDLL, name: str, weights: Array, importance: Array | None) -> Array:
    """``weights`` quantized to a ggml type and back."""
    kind = GGMLQuantizationType[name]
    packed = np.zeros((len(weights), library.ggml_row_size(int(kind), weights.shape[1])), np.uint8)
    pointer = None if importance is None else importance.ctypes.data
    library.ggml_quantize_chunk(
        int(kind), weights.ctypes.data, packed.ctypes.data, 0, len(weights), weights.shape[1], pointer
    )
    return quants.dequantize(packed, kind)


def uniform(weights: Array, bits: int, group: int) -> Array:
    """Round to nearest on an asymmetric grid from the smallest to the largest weight of each group."""
    w = weights.reshape(-1, weights.shape[1] if group < 0 else group)
    low, high = w.min(axis=1, keepdims=True), w.max(axis=1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    return (np.rint((w - low) / step) * step + low).reshape(weights.shape)


def code_book(weights: Array, levels: tuple[float, ...]) -> Array:
    """The nearest level times the largest magnitude of each block of 64."""
    w = weights.reshape(-1, BLOCK_64)
    scale = np.abs(w).max(axis=1, keepdims=True)
    known = np.array(sorted(levels))
    between = (known[1:] + known[:-1]) / 2
    return (known[np.searchsorted(between, w / scale)] * scale).reshape(weights.shape)


def int8(weights: Array) -> Array:
    """Row-wise absolute-maximum INT8 (Dettmers et al. 2022, arXiv:2208.07339, without its outlier columns)."""
    scale = np.abs(weights).max(axis=1, keepdims=True) / 127
    return np.rint(weights / scale) * scale


def fp8(weights: Array) -> Array:
    """E4M3 with one scale per row: three bits of mantissa, the smallest normal exponent -6."""
    scale = np.abs(weights).max(axis=1, keepdims=True) / FP8_LARGEST
    scaled = weights / scale
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(scaled), 1e-30))), -6)
    step = 2.0 ** (exponent - 3)
    return np.rint(scaled / step) * step * scale


def ggml_rows(weights: Array, importance: Array) -> Iterator[dict[str, object]]:
    """One row a type of ``data/ggml_types.csv`` that quantizes weights."""
    library, even = ggml(), np.ones(COLUMNS, np.float32)
    for row in read_table("ggml_types.csv"):
        name = row["name"]
        if name in LEFT_OUT or int(row["block_weights"]) == 1:
            continue
        plain = through_ggml(library, name, weights, even if name in DEMAND_IMATRIX else None)
        guided = through_ggml(library, name, weights, importance)
        yield {
            "method": "gguf",
            "type": name,
            "group_size": "",
            "relative_error": relative_error(weights, plain),
            "relative_error_imatrix": relative_error(weights, guided, importance),
            "source": "ggml_quantize_chunk of llama-cpp-python 0.3.36",
        }


def other_rows(weights: Array) -> Iterator[dict[str, object]]:
    """Uniform grids by bits and group size, bitsandbytes and FP8."""
    for bits in (2, 3, 4, 5, 6, 8):
        for group in GROUPS:
            yield {
                "method": "uniform",
                "type": f"{bits}bit",
                "group_size": group,
                "relative_error": relative_error(weights, uniform(weights, bits, group)),
                "source": "round to nearest between each group's extremes; GPTQ and AWQ start from this grid",
            }
    made = {
        ("bitsandbytes", "nf4"): code_book(weights, NF4),
        ("bitsandbytes", "nf4-dq"): code_book(weights, NF4),
        ("bitsandbytes", "fp4"): code_book(weights, FP4),
        ("bitsandbytes", "int8"): int8(weights),
        ("none", "fp8"): fp8(weights),
    }
    for (method, type_), values in made.items():
        yield {
            "method": method,
            "type": type_,
            "group_size": "",
            "relative_error": relative_error(weights, values),
            "source": "arXiv:2305.14314, arXiv:2208.07339, arXiv:2209.05433 (E4M3)",
        }


def main() -> None:
    """Compute all rows and write the table."""
    random = np.random.default_rng(SEED)
    weights = random.standard_normal((ROWS, COLUMNS), dtype=np.float32)
    importance = np.exp(IMPORTANCE_SIGMA * random.standard_normal(COLUMNS)).astype(np.float32)
    columns = ("method", "type", "group_size", "relative_error", "relative_error_imatrix", "source", "date")
    with data_path("type_noise.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for row in (*ggml_rows(weights, importance), *other_rows(weights)):
            for key in ("relative_error", "relative_error_imatrix"):
                row[key] = f"{row[key]:.3e}" if key in row else ""
            writer.writerow({**row, "date": datetime.date.today().isoformat()})
            print(row["method"], row["type"], row["group_size"], row["relative_error"], row["relative_error_imatrix"])


if __name__ == "__main__":
    main()
