"""Every family against llama.cpp's own converter (all bytes) and against transformers (logits)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from planner.convert import check_tokenizer, convert_checkpoint
from tests import convert_fixtures as make

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(find_spec(name) for name in ("torch", "transformers", "tokenizers", "sentencepiece", "llama_cpp")),
        reason="needs torch, transformers, tokenizers, sentencepiece and llama-cpp-python",
    ),
]

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def longrope(trained_context: int, context: int) -> dict[str, Any]:
    """Phi-3's scaling: long factors beyond the trained context, which the 48 tokens here are or are not."""
    factors = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(16)],
        "long_factor": [1.0 + 0.5 * i for i in range(16)],
        "original_max_position_embeddings": trained_context,
    }
    return {
        "rope_parameters": factors,
        "original_max_position_embeddings": trained_context,
        "max_position_embeddings": context,
        "sliding_window": 200,
    }


def spm(directory: Path) -> None:
    make.write_sentencepiece(directory)


def gemma_spm(directory: Path) -> None:
    make.write_sentencepiece(directory, add_dummy_prefix=False, **make.GEMMA_IDS)


def bpe(splitter: str, tokenizer_class: str = "PreTrainedTokenizerFast") -> Callable[[Path], None]:
    return lambda directory: make.write_bpe(directory, splitter, tokenizer_class=tokenizer_class)


@dataclass(frozen=True)
class Case:
    config: str
    tokenizer: Callable[[Path], None]
    pre: str = ""
    more: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"


CASES = {
    "llama": Case("LlamaConfig", spm),
    "llama-tied-biased": Case(
        "LlamaConfig", bpe("digits"), "smollm", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    ),
    "llama-3.1": Case("LlamaConfig", bpe("llama3"), "llama-bpe", {"rope_parameters": LLAMA3_ROPE}),
    "llama-f16": Case("LlamaConfig", bpe("gpt2"), "gpt-2", dtype="float16"),
    "llama-linear": Case(
        "LlamaConfig",
        spm,
        more={"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "num_key_value_heads": 8},
    ),
    "llama-yarn": Case("LlamaConfig", spm, more={"rope_parameters": YARN}),
    "mistral": Case("MistralConfig", spm, more={"head_dim": 64, "sliding_window": None}),
    "mixtral": Case("MixtralConfig", spm, more={"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Case("Qwen2Config", bpe("qwen2"), "qwen2", {"tie_word_embeddings": True}),
    "qwen2-moe": Case("Qwen2MoeConfig", bpe("qwen2"), "qwen2", {**EXPERTS, "shared_expert_intermediate_size": 256}),
    "qwen3": Case("Qwen3Config", bpe("qwen2"), "qwen2", {"head_dim": 64}),
    "qwen3-moe": Case("Qwen3MoeConfig", bpe("qwen2"), "qwen2", {**EXPERTS, "head_dim": 64, "norm_topk_prob": True}),
    "gemma-2": Case(
        "Gemma2Config",
        gemma_spm,
        more={"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16, "num_hidden_layers": 4},
    ),
    "gemma-3": Case(
        "Gemma3TextConfig",
        gemma_spm,
        more={"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16, "num_hidden_layers": 6},
    ),
    "phi-3": Case("Phi3Config", spm, more={"sliding_window": 64}),
    "phi-3-long-factors": Case("Phi3Config", spm, more=longrope(trained_context=32, context=256)),
    "phi-3-short-factors": Case("Phi3Config", spm, more=longrope(trained_context=512, context=2048)),
    "phi-4": Case("Phi3Config", bpe("llama3-merges", "GPT2Tokenizer"), "dbrx"),
    "granite": Case(
        "GraniteConfig",
        bpe("digits"),
        "refact",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
            "tie_word_embeddings": True,
        },
    ),
}


@pytest.fixture(scope="session")
def llama_cpp_source() -> Path:
    return make.find_llama_cpp_source()


@pytest.fixture(scope="module", params=list(CASES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path, Any]:
    import transformers

    case = CASES[request.param]
    directory = tmp_path_factory.mktemp("checkpoint") / request.param
    config = getattr(transformers, case.config)(**{**SHAPE, **case.more})
    model = make.make_model(config, directory, dtype=case.dtype)
    case.tokenizer(directory)
    return case, directory, model


def header(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {key: (field.types, field.contents()) for key, field in GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, tuple[Any, list[int], bytes]]:
    from gguf import GGUFReader

    return {
        tensor.name: (tensor.tensor_type, tensor.shape.tolist(), tensor.data.tobytes())
        for tensor in GGUFReader(path).tensors
    }


ALLOWED = {
    "tokenizer.ggml.unknown_token_id": "qplan names <unk> where it is not 0, which llama.cpp assumes",
    "general.sampling.penalty_repeat": "read from repetition_penalty by some releases of the gguf package only",
}
"""Metadata keys that may be in one of the two files only, and why."""


@pytest.mark.parametrize("out_type", ["f32", "bf16"])
def test_same_bytes_as_llama_cpps_converter(
    checkpoint: tuple[Case, Path, Any], out_type: str, llama_cpp_source: Path, tmp_path: Path
) -> None:
    case, directory, _ = checkpoint
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    convert_checkpoint(directory, ours, out_type=out_type)
    make.script_convert(llama_cpp_source, directory, theirs, out_type, pre=case.pre)
    found, expected = header(ours), header(theirs)
    differing = {key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)}
    one_sided = {key for key in differing if key in ALLOWED and (key not in found or key not in expected)}
    if one_sided:
        differing -= {*one_sided, "GGUF.kv_count"}
    assert {key: (found.get(key), expected.get(key)) for key in differing} == {}
    # the script writes attn_factor while it makes tensors, so before general.name
    if not one_sided and not any(key.endswith("rope.scaling.attn_factor") for key in found):
        assert ours.read_bytes() == theirs.read_bytes()
    assert list(tensors(ours)) == list(tensors(theirs))
    assert tensors(ours) == tensors(theirs)


def test_same_logits_as_transformers(checkpoint: tuple[Case, Path, Any], tmp_path: Path) -> None:
    import numpy as np

    _, directory, model = checkpoint
    gguf = tmp_path / "model.gguf"
    convert_checkpoint(directory, gguf, out_type="f32")
    tokens = [int(token) for token in np.random.default_rng(7).integers(3, 900, size=48)]
    expected, found = make.transformers_logits(model, tokens), make.llama_logits(gguf, tokens)
    error = np.abs(found - expected).max() / expected.std()
    print(f"{directory.name}: largest logit difference {error:.2e} of the standard deviation")
    # float32 in both; ggml's GELU and exp tables and the order of sums are the rest
    assert error < 5e-3


def test_same_tokens_as_its_own_tokenizer(checkpoint: tuple[Case, Path, Any], tmp_path: Path) -> None:
    _, directory, _ = checkpoint
    gguf = tmp_path / "model.gguf"
    convert_checkpoint(directory, gguf)
    found = check_tokenizer(directory, gguf)
    assert found.same, found.detail


def test_the_text_part_of_a_multimodal_gemma_3(llama_cpp_source: Path, tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**SHAPE, "head_dim": 64, "num_hidden_layers": 2, "sliding_window": 16}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    directory = tmp_path / "gemma-3-vision"
    Gemma3ForConditionalGeneration(config).bfloat16().save_pretrained(directory, max_shard_size="1MB")
    gemma_spm(directory)
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    convert_checkpoint(directory, ours, out_type="bf16")
    make.script_convert(llama_cpp_source, directory, theirs, "bf16")
    found, expected = header(ours), header(theirs)
    differing = {key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key)}
    assert differing <= {*ALLOWED, "GGUF.kv_count"}
    assert tensors(ours) == tensors(theirs)
