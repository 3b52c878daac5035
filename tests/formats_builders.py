"""Builds small safetensors and GGUF files byte by byte, so that tests can also build broken ones."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "I8": 1, "F8_E4M3": 1}
GGUF_KINDS = {"u8": 0, "u16": 2, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "arr": 9, "u64": 10}
GGUF_FORMATS = {"u8": "<B", "u16": "<H", "u32": "<I", "i32": "<i", "f32": "<f", "bool": "<?", "u64": "<Q"}
GGML = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144), "BF16": (30, 1, 2)}


def safetensors_header(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None):
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    return entries, offset


def safetensors_bytes(entries: Any, data: bytes) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> Path:
    """Zeros, as holes in a sparse file: a large checkpoint costs no disk."""
    entries, size = safetensors_header(tensors, {"format": "pt"})
    with path.open("wb") as stream:
        stream.write(safetensors_bytes(entries, b""))
        stream.truncate(stream.tell() + size)
    return path


LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def llama_tensors(config: dict[str, Any], dtype: str = "BF16") -> dict[str, tuple[str, tuple[int, ...]]]:
    width, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.input_layernorm.weight": (width,),
            f"{block}.self_attn.q_proj.weight": (width, width),
            f"{block}.self_attn.k_proj.weight": (kv, width),
            f"{block}.self_attn.v_proj.weight": (kv, width),
            f"{block}.self_attn.o_proj.weight": (width, width),
            f"{block}.post_attention_layernorm.weight": (width,),
            f"{block}.mlp.gate_proj.weight": (hidden, width),
            f"{block}.mlp.up_proj.weight": (hidden, width),
            f"{block}.mlp.down_proj.weight": (width, hidden),
        }
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    return {name: (dtype, shape) for name, shape in shapes.items()}


def write_checkpoint(
    folder: Path, *, shards: int = 1, extra: dict[str, tuple[str, tuple[int, ...]]] | None = None, **changes: Any
) -> Path:
    """A Llama checkpoint of zeros: config.json, weights in ``shards`` files with an index, a tokenizer config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**LLAMA_CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tensors = {**llama_tensors({**LLAMA_CONFIG, **changes}), **(extra or {})}
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        write_safetensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def gguf_text(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def gguf_value(kind: str, value: Any) -> bytes:
    if kind == "str":
        return gguf_text(value)
    if kind == "arr":
        element, items = value
        head = struct.pack("<IQ", GGUF_KINDS[element], len(items))
        return head + b"".join(gguf_value(element, item) for item in items)
    return struct.pack(GGUF_FORMATS[kind], value)


def gguf_bytes(
    metadata: dict[str, tuple[str, Any]],
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, (kind, value) in metadata.items():
        out += gguf_text(key) + struct.pack("<I", GGUF_KINDS[kind]) + gguf_value(kind, value)
    offset = 0
    for name, (kind, shape) in tensors.items():
        number, block, size = GGML[kind]
        out += gguf_text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        out += struct.pack("<IQ", number, offset)
        offset += -(-(prod(shape) // block * size) // alignment) * alignment
    if tensors:
        out += bytes(-len(out) % alignment)
    return out + bytes(offset)


def gguf_llama(
    *, layers: int = 2, width: int = 256, hidden: int = 512, vocab: int = 320, kind: str = "F16", **changes: Any
) -> tuple[dict[str, tuple[str, Any]], dict[str, tuple[str, tuple[int, ...]]]]:
    """Metadata and tensors of a small Llama; ``changes`` replace metadata under ``llama.``, dots as ``__``."""
    metadata: dict[str, tuple[str, Any]] = {
        "general.architecture": ("str", "llama"),
        "general.name": ("str", "Small Llama"),
        "llama.block_count": ("u32", layers),
        "llama.context_length": ("u32", 4096),
        "llama.embedding_length": ("u32", width),
        "llama.feed_forward_length": ("u32", hidden),
        "llama.attention.head_count": ("u32", 4),
        "llama.attention.head_count_kv": ("u32", 2),
        "tokenizer.ggml.model": ("str", "llama"),
        "tokenizer.ggml.tokens": ("arr", ("str", [f"t{number}" for number in range(vocab)])),
        "tokenizer.ggml.scores": ("arr", ("f32", [0.0] * vocab)),
    }
    metadata |= {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}
    kv = width // 2
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"token_embd.weight": (kind, (width, vocab))}
    for layer in range(layers):
        for name, shape in (
            ("attn_norm", (width,)),
            ("attn_q", (width, width)),
            ("attn_k", (width, kv)),
            ("attn_v", (width, kv)),
            ("attn_output", (width, width)),
            ("ffn_norm", (width,)),
            ("ffn_gate", (width, hidden)),
            ("ffn_up", (width, hidden)),
            ("ffn_down", (hidden, width)),
        ):
            tensors[f"blk.{layer}.{name}.weight"] = ("F32" if "norm" in name else kind, shape)
    tensors["output_norm.weight"] = ("F32", (width,))
    tensors["output.weight"] = (kind, (width, vocab))
    return metadata, tensors


def write_gguf(path: Path, **changes: Any) -> Path:
    path.write_bytes(gguf_bytes(*gguf_llama(**changes)))
    return path
