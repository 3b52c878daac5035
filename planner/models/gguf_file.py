"""A GGUF file as a ``ModelSpec``: shapes and types from its tensor infos, everything else from its metadata."""

from __future__ import annotations

import re
from collections import Counter
from math import prod
from pathlib import Path

from planner.core.data import read_table
from planner.core.errors import InputError
from planner.core.model import MixtureOfExperts, ModelSource, ModelSpec, SourceFile, Tensor
from planner.formats.gguf import ArrayInfo, GgufHeader, open_gguf
from planner.models.family import guess_family
from planner.models.gguf_attention import Figures, attention_layers, is_latent

# tokenizer.ggml.model (llama-vocab.cpp) → the core's names
_TOKENIZERS = {"llama": "spm", "gpt2": "bpe", "bert": "wpm"}
# LLAMA_FTYPE_GUESSED of llama.h: the loader's guess, not the file's word
_GUESSED = 1024
# tools/quantize/quantize.cpp writes it
_IMATRIX_KEY = "quantize.imatrix.file"
# types whose GGUF name is also a publication's, in the core's spelling
_PUBLISHED = {"F32": "f32", "F16": "f16", "BF16": "bf16", "MXFP4": "mxfp4"}
_BLOCK = re.compile(r"blk\.([0-9]{1,4})\.")
_SHARD_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")
# general.type and general.architecture of GGUF files that hold no language model
_OTHER_CONTENTS = {
    "adapter": "a LoRA adapter: merge it into its base model first, with llama.cpp's `llama-export-lora`",
    "mmproj": "a vision or audio projector: give the language model's file beside it",
    "clip": "a vision or audio projector: give the language model's file beside it",
    "imatrix": "an importance matrix: give the model it was made for",
}


def spec_from_gguf(path: Path) -> ModelSpec:
    """The model in the GGUF file ``path``, with all shards if it is split.

    Raises:
        InputError: missing, malformed, truncated, or no language model; see ``planner.formats.gguf``.
    """
    header = open_gguf(path)
    files = tuple(SourceFile(name=file.name, size_bytes=file.stat().st_size) for file in header.files)
    source = ModelSource(kind="gguf", location=str(path), files=files)
    return spec_from_header(header, source)


def spec_from_header(header: GgufHeader, source: ModelSource) -> ModelSpec:
    """The model behind ``header``, which may have come over the network.

    Raises:
        InputError: figures or tensors are missing or contradict each other (``bad-gguf-metadata``), or the file holds
            something else than a language model (``not-a-model``).
    """
    figures = Figures(header.metadata, _architecture(header), header.path)
    total_layers = figures.layer_count + figures.count("nextn_predict_layers", 0)
    tensors = _tensors(header, total_layers)
    attention = attention_layers(figures)
    name = _name(header)
    n_vocab = _vocabulary(header, figures)
    dtype = _main_type(header)
    return ModelSpec(
        name=name,
        architecture=figures.architecture,
        family=guess_family((name, header.path.name), figures.architecture, n_vocab) or figures.architecture,
        source=source,
        n_layer=figures.layer_count,
        n_embd=figures.count("embedding_length"),
        n_vocab=n_vocab,
        n_ctx_train=figures.count("context_length"),
        n_ff=figures.count("feed_forward_length", 0),
        tensors=tensors,
        attention=attention,
        mixture=_mixture(figures, tensors),
        mla=is_latent(figures),
        n_head=max(layer.head_count for layer in attention),
        n_head_kv=max(layer.head_count_kv for layer in attention),
        dtype=dtype,
        tokenizer=_TOKENIZERS.get(str(header.metadata.get("tokenizer.ggml.model"))),
        notes=_notes(header, dtype),
        file_type=None if dtype in ("F32", "F16", "BF16") else _file_type(header),
        guided=_IMATRIX_KEY in header.metadata,
    )


def file_type_of(path: Path) -> str:
    """llama.cpp's name of the file type of the GGUF file ``path``: ``Q4_K_M``, ``F16`` …

    Taken from ``general.file_type``; where that is missing or a guess, from the type most bytes are stored in.

    Raises:
        InputError: no such file, or a mix of types that has no name (``unknown-file-type``).
    """
    header = open_gguf(path)
    found = _file_type(header)
    if found is None:
        raise InputError(
            f"{path.name!r} is of a file type qplan does not know",
            numbers=f"general.file_type {header.metadata.get('general.file_type')!r}, most is {_most_bytes(header)}",
            code="unknown-file-type",
        )
    return found


def _file_type(header: GgufHeader) -> str | None:
    rows = read_table("gguf_ftypes.csv")
    number = header.metadata.get("general.file_type")
    main = _most_bytes(header)
    if isinstance(number, int) and not number & _GUESSED:
        for row in rows:
            if int(row["id"]) == number:
                return row["name"]
    for row in rows:
        if row["default_type"] == main:
            return row["name"]
    return None


def made_with_imatrix(path: Path) -> bool:
    """Whether the GGUF file ``path`` says that an importance matrix guided its quantization.

    Raises:
        InputError: no such file, or malformed.
    """
    return _IMATRIX_KEY in open_gguf(path).metadata


def _architecture(header: GgufHeader) -> str:
    kind, architecture = header.metadata.get("general.type"), header.metadata.get("general.architecture")
    for value in (kind, architecture):
        if isinstance(value, str) and value in _OTHER_CONTENTS:
            raise InputError(f"{header.path.name!r} holds {_OTHER_CONTENTS[value]}", code="not-a-model")
    if not isinstance(architecture, str) or not architecture:
        raise InputError(f"{header.path.name!r} names no general.architecture", code="bad-gguf-metadata")
    if not header.tensors:
        raise InputError(
            f"{header.path.name!r} has metadata but no tensors",
            numbers=f"{len(header.metadata)} keys, 0 tensors: a vocabulary, or the first part of a split model",
            hint="give the file that holds the weights",
            code="no-weights",
        )
    return architecture


def _name(header: GgufHeader) -> str:
    name = header.metadata.get("general.name")
    stem = _SHARD_SUFFIX.sub("", header.path.name.removesuffix(".gguf"))
    return name.strip() if isinstance(name, str) and name.strip().isprintable() and name.strip() else stem


def _tensors(header: GgufHeader, layer_count: int) -> tuple[Tensor, ...]:
    for tensor in header.tensors:
        if tensor.name.startswith("blk."):
            match = _BLOCK.match(tensor.name)
            if match is None or int(match[1]) >= layer_count:
                numbers = f"{layer_count} blocks by its metadata"
                raise InputError(
                    f"{header.path.name!r} has a tensor {tensor.name!r} outside its blocks",
                    numbers=numbers,
                    code="bad-gguf-metadata",
                )
    return tuple(Tensor(tensor.name, tensor.shape, tensor.type) for tensor in header.tensors)


def _vocabulary(header: GgufHeader, figures: Figures) -> int:
    """Rows of the embedding, which a vocabulary's padding is part of."""
    for tensor in header.tensors:
        if tensor.name == "token_embd.weight" and len(tensor.shape) == 2:
            return tensor.shape[1]
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    return figures.count("vocab_size", tokens.count if isinstance(tokens, ArrayInfo) else None)


def _mixture(figures: Figures, tensors: tuple[Tensor, ...]) -> MixtureOfExperts | None:
    count = figures.count("expert_count", 0)
    if not count:
        return None
    routed = [tensor for tensor in tensors if tensor.name.endswith("_exps.weight")]
    used = figures.count("expert_used_count", 0)
    if not 0 < used <= count or any(tensor.shape[-1] != count for tensor in routed):
        raise figures.bad("expert_count", f"is {count}, with {used} in use: not what its tensors say")
    width = next((tensor.shape[0] for tensor in routed if "ffn_down" in tensor.name), 0)
    leading = min((tensor.layer or 0 for tensor in routed), default=0)
    shared = any("_shexp." in tensor.name for tensor in tensors)
    return MixtureOfExperts(
        expert_count=count,
        expert_used_count=used,
        expert_feed_forward=width or figures.count("expert_feed_forward_length", 0),
        shared_expert_count=figures.count("expert_shared_count", int(shared)),
        leading_dense_layer_count=figures.count("leading_dense_block_count", leading),
    )


def _main_type(header: GgufHeader) -> str:
    """The type that most bytes are stored in, in the core's spelling."""
    main = _most_bytes(header)
    return _PUBLISHED.get(main, main)


def _most_bytes(header: GgufHeader) -> str:
    totals: Counter[str] = Counter()
    for tensor in header.tensors:
        totals[tensor.type] += tensor.size_bytes
    return totals.most_common(1)[0][0] if totals else "none"


def _notes(header: GgufHeader, dtype: str) -> tuple[str, ...]:
    if dtype in ("f32", "f16", "bf16") or (dtype == "mxfp4" and header.metadata["general.architecture"] == "gpt-oss"):
        return ()
    elements = sum(prod(tensor.shape) for tensor in header.tensors)
    bits = 8 * header.tensor_bytes / elements
    return (f"already quantized, mostly {dtype}, {bits:.2f} bits per weight: quantize from the 16-bit model instead",)
