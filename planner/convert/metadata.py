"""The key-values of a converted GGUF file, in the order llama.cpp's converter writes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from planner.convert.config import MAX_DIMENSION, Config
from planner.convert.families import Family
from planner.convert.keyvalue import KeyValue, merge, string, u32
from planner.convert.rows import NamedTensor
from planner.convert.special import optional_object
from planner.convert.vocab import Vocabulary
from planner.core.errors import InputError

FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}
"""``llama_ftype`` in llama.h by the type of the weights."""
QUANTIZATION_VERSION = 2
"""``GGML_QNT_VERSION`` in ggml.h."""


def parameter_counts(tensors: Iterable[NamedTensor]) -> tuple[int, int, int, int]:
    """(all, shared, per-expert, experts) weights: ``GGUFWriter.get_total_parameter_count``, for the size label."""
    total = shared = expert = experts = expert_tensors = 0
    for tensor in tensors:
        size = tensor.element_count
        total += size
        if "_exps." in tensor.name and len(tensor.shape) >= 3:
            expert += size // tensor.shape[2]
            experts += tensor.shape[2]
            expert_tensors += 1
        else:
            shared += size
    return total, shared, expert, experts // expert_tensors if expert_tensors else 0


def key_values(
    directory: Path,
    config: Config,
    family: Family,
    tensors: list[NamedTensor],
    vocabulary: Vocabulary,
    *,
    weight_type: str,
    model_name: str,
) -> list[KeyValue]:
    """Everything in front of the tensors.

    Raises:
        InputError: config.json lacks a value (``bad-config``), or README.md has malformed front matter
            (``bad-model-card``).
    """
    entries = [string("general.architecture", family.architecture), string("general.type", "model")]
    entries += general(directory, parameter_counts(tensors), model_name)
    entries += family.parameters(config)
    entries.append(u32("general.file_type", FILE_TYPES[weight_type]))
    entries.append(u32("general.quantization_version", QUANTIZATION_VERSION))
    return merge(entries + vocabulary.entries)


def general(directory: Path, counts: tuple[int, int, int, int], model_name: str) -> list[KeyValue]:
    """Name, size, licence, tags and recommended sampling, as the ``gguf`` package reads them from the model card.

    ``model_name`` stands for the directory's name: a checkpoint in the hub's cache lies in a folder named by a hash.
    """
    import gguf
    import yaml  # type: ignore[import-untyped]

    try:
        card = gguf.Metadata.load_model_card(directory)
        stated = gguf.Metadata.load_hf_parameters(directory)
        found = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, stated, Path(model_name), counts[0])
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            "README.md has malformed front matter", numbers=str(error)[:200], code="bad-model-card"
        ) from None
    for key, value in _sampling(directory):
        setattr(found, key, value)
    if found.name is None:
        found.name = model_name
    if found.size_label is None and counts[0] > 0:
        found.size_label = gguf.size_label(*counts)
    writer = gguf.GGUFWriter(path=None, arch="")
    found.set_gguf_meta_model(writer)
    return [_plain(key, value, gguf.GGUFValueType) for key, value in writer.kv_data[0].items()]


_SAMPLING: tuple[tuple[str, str, type], ...] = (
    ("sequence", "sampling_sequence", str),
    ("top_k", "sampling_top_k", int),
    ("top_p", "sampling_top_p", float),
    ("min_p", "sampling_min_p", float),
    ("xtc_probability", "sampling_xtc_probability", float),
    ("xtc_threshold", "sampling_xtc_threshold", float),
    ("temperature", "sampling_temp", float),
    ("penalty_last_n", "sampling_penalty_last_n", int),
    ("repetition_penalty", "sampling_penalty_repeat", float),
    ("penalty_repeat", "sampling_penalty_repeat", float),
    ("mirostat", "sampling_mirostat", int),
    ("mirostat_tau", "sampling_mirostat_tau", float),
    ("mirostat_eta", "sampling_mirostat_eta", float),
)


def _sampling(directory: Path) -> list[tuple[str, Any]]:
    """Recommended sampling of generation_config.json; values of a wrong kind are left out, as advice may be."""
    stated = optional_object(directory / "generation_config.json") or {}
    found: list[tuple[str, Any]] = []
    for name, key, kind in _SAMPLING:
        value: Any = stated.get(name)
        if kind is str:
            usable = isinstance(value, str)
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_DIMENSION
            usable = number and (kind is float or value == int(value))
        if usable:
            found.append((key, kind(value)))
    return found


_KINDS = {"UINT32": "u32", "INT32": "i32", "FLOAT32": "f32", "BOOL": "bool", "STRING": "string", "ARRAY": "array"}


def _plain(key: str, entry: Any, value_type: Any) -> KeyValue:
    return KeyValue(key, _KINDS[value_type(entry.type).name], entry.value)


def display_name(directory: Path) -> str:
    """The model's name by its directory: of ``models--ORG--NAME/snapshots/HASH`` it is ``NAME``.

    Deterministic, and never a path.
    """
    directory = directory.resolve()
    with contextlib.suppress(IndexError):
        repository = directory.parents[1].name
        if directory.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.split("--")[-1]
    return directory.name or "model"
