"""Conversion of hand-written checkpoints: what comes out, what is refused, and what is left behind."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from planner.convert import can_convert, check_tokenizer, convert_checkpoint, prepare, supported_model_types
from planner.convert.bpe import pieces_from_merges
from planner.convert.config import make_config
from planner.convert.encode import encode, float32_to_bf16, to_float32
from planner.convert.external import convert_with_script, find_script
from planner.convert.metadata import display_name
from planner.convert.pretokenizer import pre_tokenizer_name, signature
from planner.convert.rows import NamedTensor, RowSlice
from planner.convert.sentencepiece import read_sentencepiece
from planner.convert.write import header_bytes
from planner.core.errors import ExecutionFailed, InputError, QplanError, UnsupportedArchitecture
from planner.formats.gguf import open_gguf
from planner.formats.safetensors import StoredTensor, open_checkpoint

HIDDEN, HEADS, KV_HEADS, FF, LAYERS, VOCAB = 64, 4, 2, 96, 2, 300
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "hidden_act": "silu",
}


def byte_alphabet() -> list[str]:
    """GPT-2's 256 characters for bytes, by byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)]


def byte_level_tokenizer() -> dict[str, Any]:
    letters = byte_alphabet()
    vocab = {letter: byte for byte, letter in enumerate(letters)}
    merges = ["t h", "th e", "Ġ the", "i n", "Ġ a", "e r"]
    vocab |= {"<s>": 256, "</s>": 257}
    for merge in merges:
        vocab[merge.replace(" ", "")] = len(vocab)
    added = [{"id": 256, "content": "<s>", "special": True}, {"id": 257, "content": "</s>", "special": True}]
    added = [{**token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False} for token in added]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def llama_shapes() -> dict[str, tuple[int, ...]]:
    head = HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[prefix + "self_attn.k_proj.weight"] = (KV_HEADS * head, HIDDEN)
        shapes[prefix + "self_attn.v_proj.weight"] = (KV_HEADS * head, HIDDEN)
        shapes[prefix + "self_attn.o_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[prefix + "mlp.gate_proj.weight"] = (FF, HIDDEN)
        shapes[prefix + "mlp.up_proj.weight"] = (FF, HIDDEN)
        shapes[prefix + "mlp.down_proj.weight"] = (HIDDEN, FF)
        shapes[prefix + "input_layernorm.weight"] = (HIDDEN,)
        shapes[prefix + "post_attention_layernorm.weight"] = (HIDDEN,)
    return shapes


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "BF16") -> None:
    header, offset = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(values.tobytes() for values in tensors.values()))


def random_bf16(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return float32_to_bf16(np.random.default_rng(seed).normal(0, 0.5, shape).astype("<f4"))


def write_checkpoint(directory: Path, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """A two-shard bfloat16 Llama with a byte-level tokenizer."""
    directory.mkdir(exist_ok=True)
    if tensors is None:
        tensors = {name: random_bf16(shape, seed) for seed, (name, shape) in enumerate(llama_shapes().items())}
    names = list(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for shard, held in shards.items():
        write_safetensors(directory / shard, {name: tensors[name] for name in held})
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (directory / "tokenizer.json").write_text(json.dumps(byte_level_tokenizer()))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return directory


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny-llama")


def read_tensor(gguf: Path, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in open_gguf(gguf).tensors if tensor.name == name)
    raw = gguf.read_bytes()[tensor.offset : tensor.offset + tensor.size_bytes]
    kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.type]
    return np.frombuffer(raw, dtype=kind).reshape(tensor.shape[::-1])


def test_a_sharded_llama_becomes_a_gguf_file(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    output = tmp_path / "out.gguf"
    result = convert_checkpoint(checkpoint, output, progress=lambda done, total: seen.append((done, total)))
    header = open_gguf(output)
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.attention.head_count_kv"] == KV_HEADS
    assert header.metadata["llama.rope.dimension_count"] == HIDDEN // HEADS
    assert header.metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert header.metadata["tokenizer.ggml.bos_token_id"] == 256
    assert header.metadata["general.file_type"] == 32
    assert len(header.tensors) == result.tensor_count == 3 + 9 * LAYERS
    assert result.weight_type == "BF16"
    assert result.file_bytes == output.stat().st_size == header.file_bytes
    assert result.tensor_bytes == header.tensor_bytes
    assert seen[0] == (0, result.tensor_bytes) and seen[-1] == (result.tensor_bytes, result.tensor_bytes)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_weights_come_through_and_rotary_rows_are_interleaved(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    convert_checkpoint(checkpoint, output)
    stored = open_checkpoint(checkpoint).tensors
    raw = {
        name: np.frombuffer(
            tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.size_bytes], dtype="<u2"
        ).reshape(tensor.shape)
        for name, tensor in stored.items()
    }
    assert np.array_equal(read_tensor(output, "blk.1.ffn_down.weight"), raw["model.layers.1.mlp.down_proj.weight"])
    norm = read_tensor(output, "blk.0.attn_norm.weight")
    assert norm.dtype == np.float32
    assert np.array_equal(norm, to_float32(raw["model.layers.0.input_layernorm.weight"], "BF16"))
    query, source = read_tensor(output, "blk.0.attn_q.weight"), raw["model.layers.0.self_attn.q_proj.weight"]
    head = HIDDEN // HEADS
    # the pair of values that a rotation mixes lay half a head apart, and now side by side
    assert np.array_equal(query[0:head:2], source[: head // 2])
    assert np.array_equal(query[1:head:2], source[head // 2 : head])


@pytest.mark.parametrize(("out_type", "file_type"), [("f32", 0), ("f16", 1), ("bf16", 32)])
def test_each_type_loads_in_llama_cpp_and_splits_text_as_the_tokenizer(
    checkpoint: Path, tmp_path: Path, out_type: str, file_type: int
) -> None:
    pytest.importorskip("llama_cpp")
    output = tmp_path / "out.gguf"
    convert_checkpoint(checkpoint, output, out_type=out_type)
    assert open_gguf(output).metadata["general.file_type"] == file_type
    found = check_tokenizer(checkpoint, output)
    assert found.same is not False, found.detail


def test_a_wrong_pre_tokenizer_is_found_out(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("tokenizers")
    output = tmp_path / "out.gguf"
    convert_checkpoint(checkpoint, output)
    tokenizer = byte_level_tokenizer()
    tokenizer["model"]["merges"].reverse()
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = check_tokenizer(checkpoint, output)
    assert found.same is False
    assert "tokens" in found.detail


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "sub" / "b.gguf"
    second.parent.mkdir()
    convert_checkpoint(checkpoint, first)
    convert_checkpoint(checkpoint, second)
    assert first.read_bytes() == second.read_bytes()


def test_no_path_of_this_machine_is_in_the_file(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    convert_checkpoint(checkpoint, output)
    assert str(tmp_path).encode() not in output.read_bytes()
    assert open_gguf(output).metadata["general.name"] == "Tiny Llama"


def test_a_folder_of_the_hub_cache_is_named_by_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models--someone--Tiny-Llama-1B" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    assert display_name(folder) == "Tiny-Llama-1B"
    assert display_name(tmp_path / "models--a--b") == "models--a--b"


def test_an_error_in_the_middle_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    output.write_bytes(b"what was there before")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint, output, progress=stop)
    assert output.read_bytes() == b"what was there before"
    assert not list(tmp_path.glob(".*partial"))


def test_a_killed_conversion_leaves_no_file_and_a_rerun_gives_the_same_bytes(checkpoint: Path, tmp_path: Path) -> None:
    output, expected = tmp_path / "out.gguf", tmp_path / "expected.gguf"
    convert_checkpoint(checkpoint, expected)
    program = (
        "import sys, time; from pathlib import Path; from planner.convert import convert_checkpoint\n"
        "wait = lambda done, total: time.sleep(30) if done > total // 2 else None\n"
        "convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), progress=wait)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(checkpoint), str(output)])
    partial = tmp_path / ".out.gguf.partial"
    deadline = time.monotonic() + 60
    while not partial.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert partial.exists() and not output.exists()
    convert_checkpoint(checkpoint, output)
    assert output.read_bytes() == expected.read_bytes()
    assert not partial.exists()


def test_a_weight_beyond_float16_is_an_error_not_an_infinity(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {name: random_bf16(shape, 1) for name, shape in llama_shapes().items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float32_to_bf16(np.array([1e5], dtype="<f4"))[0]
    write_checkpoint(checkpoint, tensors)
    with pytest.raises(InputError) as caught:
        convert_checkpoint(checkpoint, tmp_path / "out.gguf", out_type="f16")
    assert caught.value.code == "f16-overflow"
    assert "blk.1.ffn_up.weight" in caught.value.what
    assert "bf16" in caught.value.hint
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*partial"))
    convert_checkpoint(checkpoint, tmp_path / "out.gguf", out_type="bf16")


def rewritten(change: dict[str, tuple[int, ...] | None]) -> dict[str, np.ndarray]:
    shapes = {**llama_shapes(), **change}
    return {name: random_bf16(shape, 2) for name, shape in shapes.items() if shape is not None}


@pytest.mark.parametrize(
    ("change", "config", "code", "words"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, {}, "missing-tensor", "blk.1.ffn_up.weight"),
        ({"lm_head.weight": None}, {}, "missing-tensor", "output.weight"),
        ({"model.norm.weight": (HIDDEN + 1,)}, {}, "wrong-shape", f"[{HIDDEN + 1}]"),
        ({}, {"num_key_value_heads": 4}, "wrong-shape", "expected"),
        ({"model.layers.0.self_attn.sinks": (HEADS,)}, {}, "unknown-tensor", "sinks"),
        ({}, {"num_hidden_layers": 1}, "unknown-tensor", "model.layers.1"),
        ({}, {"hidden_size": "64"}, "bad-config", "hidden_size"),
        ({}, {"vocab_size": 1 << 60}, "bad-config", "vocab_size"),
        ({}, {"tie_word_embeddings": "false"}, "bad-config", "true or false"),
        ({}, {"model_type": "mistral", "sliding_window": "x"}, "bad-config", "sliding_window"),
        ({}, {"model_type": "mamba"}, "unsupported-architecture", "mamba"),
        ({}, {"quantization_config": {"quant_method": "gptq"}}, "unsupported-architecture", "gptq"),
        ({}, {"rope_scaling": {"rope_type": "mystery"}}, "unsupported-architecture", "mystery"),
    ],
)
def test_a_checkpoint_that_does_not_fit_together_is_refused(
    tmp_path: Path, change: dict[str, Any], config: dict[str, Any], code: str, words: str
) -> None:
    directory = write_checkpoint(tmp_path / "m", rewritten(change), **config)
    with pytest.raises(QplanError) as caught:
        convert_checkpoint(directory, tmp_path / "out.gguf")
    assert caught.value.code == code
    assert words in str(caught.value)
    assert not list(tmp_path.glob("*.gguf"))


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    without = write_checkpoint(tmp_path / "a", rewritten({"lm_head.weight": None}), tie_word_embeddings=True)
    names = [tensor.name for tensor in prepare(without).tensors]
    assert "output.weight" not in names and "token_embd.weight" in names
    repeated = write_checkpoint(tmp_path / "b", tie_word_embeddings=True)
    assert "output.weight" not in [tensor.name for tensor in prepare(repeated).tensors]


@pytest.mark.parametrize(("dtype", "code"), [("F8_E8M0", "unsupported-dtype"), ("I8", "unsupported-dtype")])
def test_quantized_weights_are_refused(tmp_path: Path, dtype: str, code: str) -> None:
    directory = write_checkpoint(tmp_path / "m")
    for file in directory.glob("*.safetensors"):
        file.unlink()
    (directory / "model.safetensors.index.json").unlink()
    tensors = {name: np.zeros(shape, dtype="u1") for name, shape in llama_shapes().items()}
    write_safetensors(directory / "model.safetensors", tensors, dtype)
    with pytest.raises(InputError) as caught:
        prepare(directory)
    assert caught.value.code == code


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "m")
    for file in directory.glob("model*"):
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(InputError) as caught:
        prepare(directory)
    assert caught.value.code == "pickled-weights"


def test_a_shard_that_shrinks_while_it_is_read_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    shard = checkpoint / "model-00002-of-00002.safetensors"

    def cut(done: int, total: int) -> None:
        if done == 0:
            os.truncate(shard, shard.stat().st_size // 2)

    with pytest.raises(InputError) as caught:
        convert_checkpoint(checkpoint, tmp_path / "out.gguf", progress=cut)
    assert caught.value.code == "truncated-safetensors"
    assert not list(tmp_path.glob(".*partial"))


def test_an_output_that_cannot_be_written_says_so(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExecutionFailed) as caught:
        convert_checkpoint(checkpoint, tmp_path / "missing" / "out.gguf")
    assert caught.value.code == "write-failed"


@pytest.mark.parametrize(
    ("file", "text", "code"),
    [
        ("tokenizer.json", "{", "bad-json"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": "b"}}}', "bad-tokenizer"),
        ("tokenizer.json", '{"model": {"type": "WordPiece", "vocab": {}}}', "unsupported-tokenizer"),
        ("tokenizer_config.json", "[]", "bad-json"),
        ("README.md", "---\n{a: [\n---\n", "bad-model-card"),
        ("config.json", "{}", "unsupported-architecture"),
    ],
)
def test_malformed_files_give_errors(checkpoint: Path, file: str, text: str, code: str) -> None:
    (checkpoint / file).write_text(text)
    with pytest.raises(QplanError) as caught:
        prepare(checkpoint)
    assert caught.value.code == code


JUNK = st.sampled_from([None, 0, -1, 1 << 70, 1.5, float("nan"), True, "", "x", "▁", [], [1], ["a"], {}, {"type": 5}])
SIDE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def spots(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(spot for key, child in inner for spot in spots(child, (*path, key)))]


def side_files() -> dict[str, Any]:
    tokenizer = byte_level_tokenizer()
    template = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": {}}
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, processor]}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    added = {"256": {"content": "<s>", "special": True}}
    stated = {"bos_token": {"content": "<s>"}, "added_tokens_decoder": added, "chat_template": [{"name": "default"}]}
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    config = {**CONFIG, "rope_scaling": rope}
    values = (config, tokenizer, stated, {"top_k": 3, "temperature": 0.6})
    return copy.deepcopy(dict(zip(SIDE_FILES, values, strict=True)))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("fuzz") / "m")


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_no_value_in_the_side_files_gives_a_traceback(fuzzed: Path, data: st.DataObject) -> None:
    files = side_files()
    name = data.draw(st.sampled_from(SIDE_FILES))
    root = {"": files[name]}
    # the 262 tokens of the vocabulary would hide all else
    places = [spot for spot in spots(root)[1:] if "vocab" not in spot[:-1] or spot[-1] in ("a", "<s>")]
    path = data.draw(st.sampled_from(places))
    node: Any = root
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = copy.deepcopy(data.draw(JUNK))
    files[name] = root[""]
    for file, value in files.items():
        (fuzzed / file).write_text(json.dumps(value))
    with contextlib.suppress(QplanError):
        assert len(header_bytes(prepare(fuzzed).key_values, [])) % 32 == 0


def test_a_tokenizer_json_that_its_library_refuses_is_an_error_and_no_crash(checkpoint: Path, tmp_path: Path) -> None:
    gguf = convert_checkpoint(checkpoint, tmp_path / "out.gguf")
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        check_tokenizer(checkpoint, tmp_path / "out.gguf")
    assert caught.value.code == "bad-tokenizer" and gguf


def test_no_tokenizer_is_an_error(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(InputError) as caught:
        prepare(checkpoint)
    assert caught.value.code == "no-tokenizer"


def test_planning_can_ask_without_heavy_imports() -> None:
    program = (
        "import sys; from planner import convert; convert.can_convert({'model_type': 'llama'});"
        "convert.supported_model_types();"
        "print(sorted({'numpy', 'gguf', 'torch', 'yaml', 'llama_cpp'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_can_convert_says_why_not() -> None:
    assert can_convert(CONFIG) is None
    assert "mamba" in str(can_convert({**CONFIG, "model_type": "mamba"}))
    assert "None" in str(can_convert({}))
    assert "awq" in str(can_convert({**CONFIG, "quantization_config": {"quant_method": "awq"}}))
    assert "dense and expert" in str(can_convert({"model_type": "qwen2_moe", "mlp_only_layers": [0]}))
    assert "gelu" in str(can_convert({**CONFIG, "hidden_act": "gelu"}))
    assert {"llama", "mixtral", "gemma3", "phi3", "qwen3_moe", "granite"} <= set(supported_model_types())


def test_both_spellings_of_rotary_settings_are_read() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}}
    read = [make_config("llama", settings, {}).rope for settings in (old, new)]
    assert all(rope["rope_theta"] == 5e5 and rope["rope_type"] == "linear" for rope in read)
    layers = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    gemma = make_config("gemma3", {"text_config": {"rope_parameters": layers}}, {})
    assert gemma.rope["rope_theta"] == 1e6 and gemma.rope_theta_sliding == 1e4
    local = make_config("gemma3", {"rope_theta": 1e6, "rope_local_base_freq": 1e4}, {})
    assert local.rope["rope_theta"] == 1e6 and local.rope_theta_sliding == 1e4


BF16_MAX = 3.3895313892515355e38


@given(arrays.arrays(np.float32, st.integers(1, 64), elements=st.floats(-BF16_MAX, BF16_MAX, width=32)))
def test_bf16_is_the_nearest(values: np.ndarray) -> None:
    back = to_float32(float32_to_bf16(values), "BF16").astype("f8")
    bits = values.view("<u4") & 0xFFFF0000
    toward_zero = bits.view("<f4").astype("f8")
    # one step away from zero, reckoned in float64 so that the last step does not overflow
    step = np.spacing(np.abs(toward_zero).astype("<f4")).astype("f8") * 2**16
    best = np.minimum(np.abs(toward_zero - values), np.abs(toward_zero + np.copysign(step, values) - values))
    assert np.all(np.abs(back - values) <= best)


def test_bf16_ties_go_to_even_and_nan_stays_nan() -> None:
    values = np.array([0x3F808000, 0x3F818000, 0x7F800001, 0xFF800000], dtype="<u4").view("<f4")
    assert float32_to_bf16(values).tolist() == [0x3F80, 0x3F82, 0x7FC0, 0xFF80]


@given(arrays.arrays(np.uint16, st.integers(1, 64)))
def test_bf16_to_bf16_keeps_every_bit(bits: np.ndarray) -> None:
    assert np.array_equal(encode(bits, "BF16", "BF16", name="x", shift=0.0), bits)
    numbers = bits[~np.isnan(to_float32(bits, "BF16"))]
    assert np.array_equal(float32_to_bf16(to_float32(numbers, "BF16")), numbers)


@pytest.mark.parametrize("block_bytes", [1, 64, 1000, 1 << 20])
def test_blocks_do_not_depend_on_their_size(tmp_path: Path, block_bytes: int) -> None:
    rows, columns, head = 24, 10, 8
    values = np.arange(rows * columns, dtype="<u2").reshape(rows, columns)
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": values})
    offset = path.stat().st_size - values.nbytes
    stored = StoredTensor(
        name="x", dtype="BF16", shape=(rows, columns), file=path, offset=offset, size_bytes=values.nbytes
    )
    tensor = NamedTensor(
        name="blk.0.attn_q.weight",
        shape=(columns, rows),
        dtype="BF16",
        slices=(RowSlice(stored, 8, 16), RowSlice(stored, 0, 8)),
        rotary_rows=head,
    )
    got = np.concatenate(list(tensor.blocks(block_bytes)))
    assert np.array_equal(got, tensor.load())
    assert np.array_equal(got[0], values[8]) and np.array_equal(got[1], values[12])
    assert np.array_equal(got[16], values[0]) and np.array_equal(got[17], values[4])


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def proto_bytes(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_model(pieces: list[tuple[str, float, int]], *, model_type: int = 2) -> bytes:
    raw = b""
    for text, score, kind in pieces:
        entry = proto_bytes(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind)
        raw += proto_bytes(1, entry)
    raw += proto_bytes(2, b"\x18" + varint(model_type))
    return raw + proto_bytes(3, b"\x18\x01\x20\x00")


def test_a_sentencepiece_model_is_read_without_the_library(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("▁a", -1.5, 1), ("<0x0A>", 0.0, 6)]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model(pieces))
    model = read_sentencepiece(path)
    assert list(model.pieces) == pieces
    assert model.model_type == 2 and model.add_dummy_prefix and not model.remove_extra_whitespaces


@given(st.binary(max_size=200))
def test_any_other_file_is_no_sentencepiece_model(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.model"
    path.write_bytes(raw)
    try:
        read_sentencepiece(path)
    except InputError as error:
        assert error.code == "bad-tokenizer"


def test_pre_tokenizers_are_known_by_structure() -> None:
    tokenizer = byte_level_tokenizer()
    assert pre_tokenizer_name(tokenizer, "llama") == "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tokenizer["pre_tokenizer"]]}
    assert pre_tokenizer_name(tokenizer, "llama") == "smollm"
    assert pre_tokenizer_name(tokenizer, "granite") == "refact"
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(UnsupportedArchitecture) as caught:
        pre_tokenizer_name(tokenizer, "llama")
    assert caught.value.code == "unknown-pretokenizer" and "--llama-cpp" in caught.value.hint
    assert signature({"type": "Sequence", "pretokenizers": [[]]}) == "unreadable"


def byte_fallback_tokenizer(merges: list[str], **more: Any) -> dict[str, Any]:
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    for merge in merges:
        texts.append(merge.replace(" ", ""))
    texts += sorted({letter for merge in merges for part in merge.split(" ") for letter in part})
    vocab = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]},
        "pre_tokenizer": None,
        "model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocab, "merges": merges},
        **more,
    }


def test_scores_are_recovered_from_merges() -> None:
    pieces, prefix = pieces_from_merges(byte_fallback_tokenizer(["▁ t", "h e", "▁t he"]))
    scores = {piece.text: piece.score for piece in pieces.values()}
    assert prefix
    assert scores["▁t"] == 0 and scores["he"] == -1 and scores["▁the"] == -2


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_fallback_tokenizer(["▁ t", "h e", "t he", "▁t he"]),  # "▁" + "the" makes "▁the" too, and is not listed
        byte_fallback_tokenizer(["▁ t", "h e"], pre_tokenizer={"type": "Metaspace", "replacement": "▁"}),
        byte_fallback_tokenizer(["▁ t", "h e"], normalizer={"type": "NFKC"}),
        byte_fallback_tokenizer(["▁ t", "h e"], normalizer=None),
    ],
)
def test_merges_that_llama_cpp_would_not_follow_are_refused(tokenizer: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        pieces_from_merges(tokenizer)
    assert caught.value.code == "tokenizer-not-reproducible"
    assert "tokenizer.model" in caught.value.hint


def test_another_family_needs_a_llama_cpp_checkout(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    with pytest.raises(UnsupportedArchitecture) as caught:
        find_script(None, "mamba")
    assert "mamba" in caught.value.what and "--llama-cpp" in caught.value.hint
    with pytest.raises(InputError) as wrong:
        find_script(tmp_path)
    assert wrong.value.code == "no-converter"


def test_the_script_of_a_checkout_is_run_atomically(checkpoint: Path, tmp_path: Path) -> None:
    made = tmp_path / "made.gguf"
    convert_checkpoint(checkpoint, made)
    source = tmp_path / "llama.cpp"
    source.mkdir()
    script = source / "convert_hf_to_gguf.py"
    script.write_text(
        "import shutil, sys\n"
        "assert sys.argv[2] == '--outfile' and sys.argv[4:] == ['--outtype', 'bf16'], sys.argv\n"
        f"shutil.copy({str(made)!r}, sys.argv[3])\n"
    )
    seen: list[tuple[int, int]] = []
    output = tmp_path / "out.gguf"
    result = convert_with_script(checkpoint, output, "bf16", source, lambda done, total: seen.append((done, total)))
    assert output.read_bytes() == made.read_bytes()
    assert result.tensor_count == 3 + 9 * LAYERS and seen[-1][0] == seen[-1][1]
    script.write_text("import sys\nopen(sys.argv[3], 'w').write('half')\nsys.exit('torch is missing')\n")
    with pytest.raises(ExecutionFailed) as caught:
        convert_with_script(checkpoint, tmp_path / "second.gguf", "bf16", source)
    assert caught.value.code == "converter-failed" and "torch is missing" in caught.value.numbers
    assert not list(tmp_path.glob("second*")) and not list(tmp_path.glob(".*partial"))
