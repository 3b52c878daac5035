"""A checkpoint directory as a ``ModelSpec``: config.json for the shapes, safetensors headers to check them against."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.core.errors import InputError
from planner.core.model import ModelSource, ModelSpec, SourceFile
from planner.formats.json_file import MAX_JSON_BYTES, read_object, size_of
from planner.formats.safetensors import StoredTensor, open_checkpoint
from planner.models.architectures import spec_from_config
from planner.models.family import guess_family

CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
SIDE_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What a conversion reads beside the weights; a plan pins those that are there."""

_DTYPES = {"BF16": "bf16", "F16": "f16", "F32": "f32", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
# Methods whose packed weights are the model as published; every other one is a quantization of a model.
_PUBLISHED_PACKED = ("fp8", "mxfp4")
_OUTPUT_NAMES = ("lm_head.weight", "output.weight", "embed_out.weight", "output_layer.weight")
_OTHER_MODALITY = re.compile(
    r"(?:^|\.)(?:vision_tower|vision_model|visual|vision_encoder|vision_embedder|audio_tower|audio_model|embed_vision"
    r"|embed_audio|multi_modal_projector|mm_projector|image_newline|mlp1|talker|token2wav)(?:\.|$)"
)
# Constants that old checkpoints carry (rotary frequencies, causal masks), and scales of packed weights
_NOT_PARAMETERS = re.compile(
    r"(?:rotary_emb\.inv_freq|\.attn\.(?:masked_)?bias|_scale_inv|_scales|\.(?:input|weight)_scale)$"
)
# Tensors that the converter computes and no checkpoint stores
_COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)")
_TOKENIZER_TYPE = re.compile(rb'"model"\s*:\s*\{\s*"type"\s*:\s*"(\w+)"')
_BYTE_FALLBACK = re.compile(rb'"byte_fallback"\s*:\s*true')
# tokenizer_config.json's tokenizer_class → the core's names, where no tokenizer.model tells
_TOKENIZER_CLASSES = {
    "gemma": "spm",
    "t5": "spm",
    "pretrained": "bpe",
    "tokenizersbackend": "bpe",
    "qwen2": "bpe",
    "gpt2": "bpe",
    "gptneox": "bpe",
    "cohere": "bpe",
    "bert": "wpm",
}


def spec_from_directory(directory: Path, *, name: str | None = None, source: ModelSource | None = None) -> ModelSpec:
    """The model whose checkpoint is in ``directory``; weights are not read.

    Args:
        directory: has config.json and ``*.safetensors``.
        name: what to call the model; the directory's name when ``None``.
        source: where it came from, if not simply from this directory; its files are filled in.

    Raises:
        InputError: ``missing-config``, ``adapter-only``, ``already-quantized``, ``pickled-weights``, ``no-weights``,
            ``missing-shard``, ``bad-config`` or a malformed header.
        UnsupportedArchitecture: no shape rules for its model type.
    """
    config = read_config(directory)
    checkpoint = open_checkpoint(directory)
    files = _source_files(directory, checkpoint.files)
    source = replace(
        source or ModelSource(kind="directory", location=str(directory.absolute())),
        files=files,
    )
    here = {file.name for file in files}
    return build_spec(
        config,
        checkpoint.tensors.values(),
        name=name or directory_name(directory),
        source=source,
        tokenizer=_sniff_tokenizer(directory / "tokenizer.json")
        or tokenizer_kind(here, _optional_object(directory / "tokenizer_config.json")),
    )


def quantized_spec(directory: Path) -> ModelSpec:
    """The model that the quantized checkpoint in ``directory`` was made from, as its config.json describes it.

    Raises:
        InputError: no configuration, or an impossible one; damaged weights.
        UnsupportedArchitecture: no shape rules for its model type.
    """
    config = {key: value for key, value in read_config(directory).items() if key != "quantization_config"}
    files = _source_files(directory, open_checkpoint(directory).files)
    return build_spec(
        config,
        (),
        name=directory_name(directory),
        source=ModelSource(kind="directory", location=str(directory.absolute()), files=files),
        tokenizer=_sniff_tokenizer(directory / "tokenizer.json"),
    )


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of ``directory``.

    Raises:
        InputError: it is missing (``missing-config``, ``adapter-only``) or no JSON object (``bad-config``).
    """
    if (directory / CONFIG_FILE).is_file():
        return read_object(directory / CONFIG_FILE, code="bad-config")
    if (directory / ADAPTER_FILE).is_file():
        base = _optional_object(directory / ADAPTER_FILE).get("base_model_name_or_path")
        raise InputError(
            f"{str(directory)!r} is an adapter, not a model",
            numbers=f"it was trained on {base!r}" if isinstance(base, str) else "",
            hint="merge it into its base model first: `PeftModel.from_pretrained(base, DIR).merge_and_unload()"
            '.save_pretrained("merged")`',
            code="adapter-only",
        )
    found = sorted(path.name for path in directory.glob("*.gguf"))
    hint = (
        f"give the GGUF file itself: {directory / found[0]}" if found else "give the directory that holds config.json"
    )
    if (directory / "params.json").is_file():
        hint = "this is Meta's original layout; download the model in the transformers layout instead"
    raise InputError(f"{str(directory)!r} has no {CONFIG_FILE}", hint=hint, code="missing-config")


def build_spec(
    config: Mapping[str, Any],
    stored: Iterable[StoredTensor],
    *,
    name: str,
    source: ModelSource,
    tokenizer: str | None,
) -> ModelSpec:
    """The spec that ``config`` gives, checked against the headers of the ``stored`` tensors.

    Raises:
        InputError: ``already-quantized``, or a field of the config is missing or impossible (``bad-config``).
        UnsupportedArchitecture: no shape rules for its model type.
    """
    _refuse_quantized(config, name)
    tensors = tuple(stored)
    stored_output = any(tensor.name.endswith(_OUTPUT_NAMES) for tensor in tensors) if tensors else None
    spec = spec_from_config(
        config,
        name=name,
        family=None,
        source=source,
        dtype=_main_dtype(config, tensors),
        tokenizer=tokenizer,
        stored_output=stored_output,
    )
    family = guess_family((name, str(config.get("_name_or_path", ""))), spec.architecture, spec.n_vocab)
    notes = spec.notes + _modality_notes(tensors) + (_count_notes(spec, tensors) if tensors else ())
    return replace(spec, family=family or spec.family, notes=notes)


def tokenizer_kind(names: set[str], tokenizer_config: Mapping[str, Any]) -> str | None:
    """``spm``, ``bpe`` or ``wpm`` from the files beside the weights; ``None`` if they do not tell."""
    if "tokenizer.model" in names:
        return "spm"
    wanted = str(tokenizer_config.get("tokenizer_class", "")).lower()
    for prefix, kind in _TOKENIZER_CLASSES.items():
        if wanted.startswith(prefix):
            return kind
    return "bpe" if "merges.txt" in names else None


def _sniff_tokenizer(path: Path) -> str | None:
    """The kind of a tokenizer.json, by a search instead of parsing its tens of megabytes.

    BPE with byte fallback is what transformers makes of a sentencepiece model.
    """
    if not path.is_file() or size_of(path) > MAX_JSON_BYTES:
        return None
    try:
        text = path.read_bytes()
    except OSError:
        return None
    match = _TOKENIZER_TYPE.search(text)
    if match is None:
        return None
    if match[1] == b"BPE" and _BYTE_FALLBACK.search(text):
        return "spm"
    return {b"BPE": "bpe", b"Unigram": "spm", b"WordPiece": "wpm"}.get(match[1])


def directory_name(directory: Path) -> str:
    """What to call the model in ``directory``: its hub id inside the hub's cache, else the directory's name."""
    absolute = directory.absolute()
    if absolute.parent.name == "snapshots" and (match := _SNAPSHOT.fullmatch(absolute.parent.parent.name)):
        return f"{match[1]}/{match[2]}"
    name = absolute.name or str(absolute)
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _optional_object(path: Path) -> dict[str, Any]:
    return read_object(path, code="bad-config") if path.is_file() else {}


def _source_files(directory: Path, weights: tuple[Path, ...]) -> tuple[SourceFile, ...]:
    sides = [directory / name for name in SIDE_FILES if (directory / name).is_file()]
    return tuple(SourceFile(name=path.name, size_bytes=size_of(path)) for path in (*sides, *weights))


def _refuse_quantized(config: Mapping[str, Any], name: str) -> None:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return
    method = str(quantization.get("quant_method", "an unnamed method"))
    if method in _PUBLISHED_PACKED:
        return
    bits = quantization.get("bits", quantization.get("w_bit"))
    base = re.sub(r"[-_](?:awq|gptq|bnb|int[48]|[48]bit).*$", "", name, flags=re.IGNORECASE)
    raise InputError(
        f"{name!r} is already quantized by {method}",
        numbers=f"{bits} bits" if isinstance(bits, int) else "",
        hint=f"give the model it was made from{f', probably {base!r}' if base != name else ''}; "
        "quantizing twice loses more than quantizing once",
        code="already-quantized",
    )


def _main_dtype(config: Mapping[str, Any], tensors: tuple[StoredTensor, ...]) -> str | None:
    """The type most bytes are stored in; ``None`` leaves it to the config."""
    quantization = config.get("quantization_config")
    if not tensors or (isinstance(quantization, Mapping) and quantization.get("quant_method") == "mxfp4"):
        return None
    weights: Counter[str] = Counter()
    for tensor in tensors:
        if not _OTHER_MODALITY.search(tensor.name):
            weights[tensor.dtype] += tensor.size_bytes
    return _DTYPES.get(weights.most_common(1)[0][0]) if weights else None


def _modality_notes(tensors: tuple[StoredTensor, ...]) -> tuple[str, ...]:
    ignored = [tensor for tensor in tensors if _OTHER_MODALITY.search(tensor.name)]
    if not ignored:
        return ()
    count = sum(tensor.element_count for tensor in ignored)
    return (
        f"only the language model counts: {len(ignored)} vision or audio tensors ({count:,} parameters) are left out",
    )


def _count_notes(spec: ModelSpec, tensors: tuple[StoredTensor, ...]) -> tuple[str, ...]:
    """A note where the shapes from the config and the stored tensors do not add up to the same."""
    stored = sum(_parameters(tensor) for tensor in tensors)
    if spec.tied_embeddings:
        stored -= sum(tensor.element_count for tensor in tensors if tensor.name.endswith("lm_head.weight"))
    expected = sum(tensor.element_count for tensor in spec.tensors if tensor.name not in _COMPUTED)
    if stored == expected:
        return ()
    return (
        f"the safetensors files hold {stored:,} parameters, the shapes from {CONFIG_FILE} add up to {expected:,} "
        f"({stored - expected:+,}): sizes may be off by that much",
    )


def _parameters(tensor: StoredTensor) -> int:
    """Weights of the language model in ``tensor``; MXFP4 packs two to a byte of a ``_blocks`` tensor."""
    if _NOT_PARAMETERS.search(tensor.name) or _OTHER_MODALITY.search(tensor.name):
        return 0
    packed = tensor.dtype == "U8" and tensor.name.endswith("_blocks")
    return tensor.element_count * (2 if packed else 1)
