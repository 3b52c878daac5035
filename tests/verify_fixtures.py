"""A tiny Llama with random weights and a SentencePiece-like vocabulary, as real GGUF files."""

from __future__ import annotations

import itertools
import string
from pathlib import Path

N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_LAYER = 256, 4, 2, 512, 2
N_CTX_TRAIN = 2048


def vocabulary() -> tuple[list[bytes], list[float], list[int]]:
    """Pieces, scores and types: control tokens, bytes, letters, and pairs of lower-case letters."""
    from gguf import TokenType

    letters = string.ascii_letters + string.digits + " .,;:!?'\"-\n()▁"
    pairs = ["".join(pair) for pair in itertools.product(string.ascii_lowercase, "aeioutnsr▁")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *dict.fromkeys([*letters, *pairs])]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    types += [TokenType.NORMAL] * (len(pieces) - len(types))
    return [p.encode() for p in pieces], [-float(i) for i in range(len(pieces))], [int(t) for t in types]


def write_tiny_llama(path: Path, *, seed: int = 0, spoil: bool = False) -> Path:
    """Write an F16 GGUF of about 1.6 M weights; ``spoil`` puts a NaN into a norm."""
    import gguf
    import numpy as np

    rng = np.random.default_rng(seed)
    pieces, scores, types = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(N_CTX_TRAIN)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(N_EMBD // N_HEAD)
    writer.add_vocab_size(len(pieces))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)

    def weight(name: str, rows: int, columns: int, scale: float) -> None:
        writer.add_tensor(name, (rng.standard_normal((rows, columns)) * scale).astype(np.float16))

    def norm(name: str) -> None:
        values = np.ones(N_EMBD, dtype=np.float32)
        if spoil and name == "output_norm.weight":
            values[3] = np.nan
        writer.add_tensor(name, values)

    kv = N_EMBD // N_HEAD * N_HEAD_KV
    weight("token_embd.weight", len(pieces), N_EMBD, 1.0)
    for i in range(N_LAYER):
        for part, rows, columns in (
            ("attn_q", N_EMBD, N_EMBD),
            ("attn_k", kv, N_EMBD),
            ("attn_v", kv, N_EMBD),
            ("attn_output", N_EMBD, N_EMBD),
            ("ffn_gate", N_FF, N_EMBD),
            ("ffn_up", N_FF, N_EMBD),
            ("ffn_down", N_EMBD, N_FF),
        ):
            weight(f"blk.{i}.{part}.weight", rows, columns, columns**-0.5)
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
    norm("output_norm.weight")
    weight("output.weight", len(pieces), N_EMBD, 2 * N_EMBD**-0.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantize(source: Path, target: Path, type_name: str) -> Path:
    """Quantize with llama.cpp itself."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    parameters.nthread = 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters) == 0
    return target


def sample_text(characters: int = 12000) -> str:
    """Words of a fixed pseudo-random order: more than two chunks of 512 tokens."""
    import random

    line = "the sun rises over an old town and no one is in the street yet, it seems; rain falls on stone"
    words = line.split(" ")
    chooser = random.Random(7)
    text = ""
    while len(text) < characters:
        text += " ".join(chooser.choices(words, k=12)) + ".\n"
    return text
