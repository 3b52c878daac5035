import json
import os
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.core.errors import InputError
from planner.formats.safetensors import (
    choose_weight_files,
    open_checkpoint,
    parse_header,
    read_header,
    read_tensor_bytes,
)
from tests.formats_builders import safetensors_bytes, safetensors_header, write_checkpoint, write_safetensors

TENSORS = {"a.weight": ("BF16", (3, 4)), "empty": ("F32", (0, 5)), "scalar": ("F32", ()), "b.weight": ("F16", (2, 2))}
ENTRIES, DATA_BYTES = safetensors_header(TENSORS, {"format": "pt"})
VALID = safetensors_bytes(ENTRIES, bytes(range(DATA_BYTES)))


def code_of(content: bytes) -> str:
    with pytest.raises(InputError) as caught:
        parse_header(content, len(content))
    return caught.value.code


def test_reads_every_tensor_with_its_place() -> None:
    header = parse_header(VALID, len(VALID))
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in header.tensors} == TENSORS
    assert header.metadata == {"format": "pt"}
    assert header.data_offset + DATA_BYTES == len(VALID)


def test_agrees_with_the_reference_implementation(tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    np = pytest.importorskip("numpy")
    arrays = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "y": np.ones((5,), dtype=np.float16)}
    numpy.save_file(arrays, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    for name, array in arrays.items():
        tensor = checkpoint.tensors[name]
        assert (tensor.shape, tensor.size_bytes) == (array.shape, array.nbytes)
        assert bytes(read_tensor_bytes(tensor)) == array.tobytes()


def test_header_is_read_without_the_weights(tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "big.safetensors", {"w": ("BF16", (1 << 20, 1 << 13))})
    tracemalloc.start()
    header = read_header(file)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert header.tensors[0].size_bytes == 1 << 34
    assert peak_bytes < 1 << 20


def test_tensor_bytes_are_a_view_at_any_offset(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(10_000)
    entries, _ = safetensors_header({"a": ("U8", (4097,)), "b": ("U8", (5903,))})
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(entries, content))
    tensors = open_checkpoint(tmp_path).tensors
    view = read_tensor_bytes(tensors["b"])
    assert view.readonly and bytes(view) == content[4097:]


def test_tensor_bytes_of_a_file_that_shrank_is_an_error(tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "model.safetensors", {"w": ("F32", (100, 100))})
    tensor = open_checkpoint(tmp_path).tensors["w"]
    os.truncate(file, 1000)
    with pytest.raises(InputError, match="cut short"):
        read_tensor_bytes(tensor)


def test_truncation_says_how_much_is_missing() -> None:
    with pytest.raises(InputError) as caught:
        parse_header(VALID, len(VALID) - 5)
    assert caught.value.code == "truncated-safetensors"
    assert f"{len(VALID)} bytes expected, {len(VALID) - 5} there" in caught.value.numbers


def entry(**changes: object) -> bytes:
    base = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}
    return safetensors_bytes({"w": base}, bytes(16))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x02",
        (101 * 10**6).to_bytes(8, "little") + bytes(100),
        (2**64 - 1).to_bytes(8, "little") + bytes(100),
        (0).to_bytes(8, "little"),
        safetensors_bytes(b"[1, 2]", b""),
        safetensors_bytes(b'{"w": ', b""),
        safetensors_bytes(b"\xff\xfe{}", b""),
        safetensors_bytes(b'{"a":' * 5000 + b"1" + b"}" * 5000, b""),
        safetensors_bytes(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}', bytes(16)),
        safetensors_bytes(b'{"w": 1, "w": 2}', b""),
        safetensors_bytes({"__metadata__": {"a": 1}}, b""),
        entry(dtype="F33"),
        entry(dtype=None),
        entry(dtype=["F32"]),
        entry(shape=[2, -2]),
        entry(shape=[2, True]),
        entry(shape="22"),
        entry(shape=[2.0, 2]),
        entry(shape=[2, 3]),
        entry(data_offsets=[16, 0]),
        entry(data_offsets=[0]),
        entry(data_offsets=[0, 2**70]),
        entry(shape=[2**40, 2**40], data_offsets=[0, 2**62]),
        entry(data_offsets=[1, 17]),
        entry(extra=1),
        entry() + b"tail",
        safetensors_bytes(
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            bytes(12),
        ),
        safetensors_bytes({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, bytes(1)),
    ],
)
def test_refuses_malformed_files(content: bytes) -> None:
    assert code_of(content) in ("bad-safetensors", "truncated-safetensors")


def test_a_git_lfs_pointer_is_named_as_such() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n"
    assert code_of(pointer) == "lfs-pointer"


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(VALID) - 1), st.integers(0, 255), st.integers(0, len(VALID)))
def test_mutated_files_parse_or_are_refused(position: int, value: int, end: int) -> None:
    mutated = bytearray(VALID)
    mutated[position] = value
    for content in (bytes(mutated), bytes(mutated[:end]), bytes(mutated) + VALID[:end]):
        try:
            parse_header(content, len(content))
        except InputError as error:
            assert error.code


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(JSON, st.sampled_from(["dtype", "shape", "data_offsets", "w", "__metadata__"]))
def test_any_json_in_any_place_parses_or_is_refused(value: object, place: str) -> None:
    inner = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    entries = {"w": inner, place: value} if place in ("w", "__metadata__") else {"w": {**inner, place: value}}
    content = safetensors_bytes(json.dumps(entries).encode(), bytes(8))
    try:
        parse_header(content, len(content))
    except InputError as error:
        str(error).encode()


def test_shards_are_merged_and_counted(tmp_path: Path) -> None:
    one, many = write_checkpoint(tmp_path / "one"), write_checkpoint(tmp_path / "many", shards=3)
    single, sharded = open_checkpoint(one), open_checkpoint(many)
    assert len(sharded.files) == 3
    assert single.total_bytes == sharded.total_bytes == 2 * single.parameter_count
    assert set(single.tensors) == set(sharded.tensors)
    assert all(tensor.file.parent == many for tensor in sharded.tensors.values())


def refused(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    return caught.value


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert refused(folder).code == "missing-shard"
    assert "model-00002-of-00003.safetensors" in refused(folder).numbers
    (folder / "model.safetensors.index.json").unlink()
    assert "2 of 3" in refused(folder).numbers


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for change in (
        {"ghost.weight": "model-00001-of-00002.safetensors"},
        {"model.norm.weight": "../elsewhere.safetensors"},
        {"model.norm.weight": 7},
        {"model.norm.weight": "pytorch_model.bin"},
    ):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        assert refused(folder).code == "bad-index"
    path.write_text("[]")
    assert refused(folder).code == "bad-index"


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model-00001-of-00002.safetensors", {"w": ("F32", (2,))})
    write_safetensors(tmp_path / "model-00002-of-00002.safetensors", {"w": ("F32", (2,))})
    assert refused(tmp_path).code == "bad-index"


def test_only_top_level_files_are_weights_of_a_repository() -> None:
    names = ["original/consolidated.safetensors", "model-00001-of-00001.safetensors", "onnx/model.safetensors", "a.bin"]
    assert choose_weight_files(names) == ("model-00001-of-00001.safetensors",)
    assert choose_weight_files(["onnx/model.safetensors"]) == ()


def test_consolidated_copies_and_adapters_are_left_out(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=2)
    write_safetensors(folder / "consolidated.safetensors", {"layers.0.w": ("BF16", (4, 4))})
    write_safetensors(folder / "adapter_model.safetensors", {"lora": ("BF16", (4, 4))})
    (folder / "model.safetensors.index.json").unlink()
    assert [file.name[:6] for file in open_checkpoint(folder).files] == ["model-", "model-"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused_with_a_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02cos\nsystem\n")
    error = refused(tmp_path)
    assert error.code == "pickled-weights"
    assert "safe_serialization=True" in error.hint


def test_no_weights_and_no_directory(tmp_path: Path) -> None:
    assert refused(tmp_path).code == "no-weights"
    assert refused(tmp_path / "nothing").code == "missing-file"
