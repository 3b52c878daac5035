import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.errors import InputError
from planner.formats.ggml import row_bytes, tensor_bytes, type_names, type_traits
from planner.formats.gguf import ArrayInfo, ShortPrefix, open_gguf, parse_header, read_array, read_header
from tests.formats_builders import GGUF_KINDS, gguf_bytes, gguf_llama, gguf_text, write_gguf

METADATA, TENSORS = gguf_llama(vocab=64)
VALID = gguf_bytes(METADATA, TENSORS)


def code_of(content: bytes) -> str:
    with pytest.raises(InputError) as caught:
        parse_header(content, len(content))
    return caught.value.code


def test_types_agree_with_the_gguf_package() -> None:
    constants = pytest.importorskip("gguf.constants")
    for kind, (block, size) in constants.GGML_QUANT_SIZES.items():
        if kind.name == "Q8_1":  # 40 in the package; 36 in ggml's static_assert: two halves and 32 bytes
            continue
        traits = type_traits(kind.name)
        assert (traits.id, traits.block_weights, traits.block_bytes) == (int(kind), block, size)
    assert {"MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "IQ1_S", "Q1_0", "Q2_0", "BF16"} <= set(type_names())


def test_bytes_of_rows_and_tensors() -> None:
    assert row_bytes("Q4_K", 4096) == 16 * 144
    assert tensor_bytes("Q8_0", (64, 3, 2)) == 2 * 34 * 6
    with pytest.raises(InputError, match="4000 weights"):
        row_bytes("Q4_K", 4000)
    with pytest.raises(InputError, match="Q9_K"):
        row_bytes("Q9_K", 256)


@pytest.mark.parametrize("version", [2, 3])
def test_reads_metadata_and_tensors(version: int) -> None:
    content = gguf_bytes(METADATA, TENSORS, version=version)
    header = parse_header(content, len(content))
    assert header.version == version
    assert {tensor.name: (tensor.type, tensor.shape) for tensor in header.tensors} == TENSORS
    assert header.metadata["llama.block_count"] == 2
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert (tokens.type, tokens.count, tokens.values) == ("str", 64, None)
    assert header.metadata["tokenizer.ggml.scores"].values == (0.0,) * 64
    last = header.tensors[-1]
    assert last.offset + last.size_bytes == len(content)
    assert header.metadata_bytes == header.data_offset == header.tensors[0].offset


def test_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    gguf, np = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(7)
    writer.add_array("some.words", ["a", "bc", "d" * 300])
    writer.add_array("some.numbers", list(range(2000)))
    writer.add_tensor("a.weight", np.ones((3, 8), dtype=np.float32))
    writer.add_tensor("b.weight", np.zeros((5, 34), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    header = open_gguf(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for tensor, theirs in zip(header.tensors, reader.tensors, strict=True):
        assert (tensor.name, tensor.type, tensor.offset) == (theirs.name, theirs.tensor_type.name, theirs.data_offset)
        assert tensor.shape == tuple(theirs.shape) and tensor.size_bytes == theirs.n_bytes
    assert header.metadata["llama.block_count"] == 7
    assert read_array(header.path, header.metadata["some.words"]) == ("a", "bc", "d" * 300)
    assert header.metadata["some.numbers"].values is None
    assert read_array(header.path, header.metadata["some.numbers"]) == tuple(range(2000))


def test_alignment_moves_the_data() -> None:
    content = gguf_bytes({**METADATA, "general.alignment": ("u32", 128)}, TENSORS, alignment=128)
    header = parse_header(content, len(content))
    assert header.alignment == 128 and all(tensor.offset % 128 == 0 for tensor in header.tensors)


def test_a_prefix_asks_for_more_until_the_header_is_whole() -> None:
    end = parse_header(VALID, len(VALID)).data_offset
    for length in (10, 100, 1000):
        with pytest.raises(ShortPrefix):
            parse_header(VALID[:length], len(VALID))
    assert parse_header(VALID[:end], len(VALID)).data_offset == end


def test_truncation_is_told_apart_from_nonsense(tmp_path: Path) -> None:
    for length in (2, 3, 12, 500, len(VALID) - 1000):
        path = tmp_path / "cut.gguf"
        path.write_bytes(VALID[:length])
        with pytest.raises(InputError) as caught:
            read_header(path)
        assert caught.value.code == "truncated-gguf"
    assert "bytes expected" in caught.value.numbers


def head(version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def key(name: str, kind: int) -> bytes:
    return gguf_text(name) + struct.pack("<I", kind)


def tensor(name: str = "w", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    return gguf_text(name) + sizes + struct.pack("<IQ", kind, offset)


BROKEN = {
    "another format": (b"PK\x03\x04" + bytes(60), "not-gguf"),
    "version 1": (head(1) + bytes(60), "gguf-version"),
    "version 9": (head(9) + bytes(60), "gguf-version"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(60), "big-endian-gguf"),
    "2^63 tensors": (head(tensors=2**63) + bytes(60), "bad-gguf"),
    "2^64-1 keys": (head(keys=2**64 - 1) + bytes(60), "bad-gguf"),
    "a million keys": (head(keys=10**6) + bytes(60), "bad-gguf"),
    "key longer than the file": (head(keys=1) + struct.pack("<Q", 5000) + bytes(60), "truncated-gguf"),
    "key of 2^62 bytes": (head(keys=1) + struct.pack("<Q", 2**62) + bytes(60), "bad-gguf"),
    "key without a name": (head(keys=1) + key("", 4) + bytes(60), "bad-gguf"),
    "key that is no UTF-8": (head(keys=1) + gguf_text(b"\xff\xfe") + struct.pack("<II", 4, 1), "bad-gguf"),
    "key twice": (head(keys=2) + (key("a", 4) + bytes(4)) * 2 + bytes(60), "bad-gguf"),
    "unknown type of value": (head(keys=1) + key("a", 13) + bytes(60), "bad-gguf"),
    "array of 2^60": (head(keys=1) + key("a", 9) + struct.pack("<IQ", 0, 2**60) + bytes(60), "bad-gguf"),
    "array beyond the file": (head(keys=1) + key("a", 9) + struct.pack("<IQ", 12, 10**6) + bytes(60), "truncated-gguf"),
    "strings beyond the file": (
        head(keys=1) + key("a", 9) + struct.pack("<IQ", 8, 10**6) + bytes(60),
        "truncated-gguf",
    ),
    "nested arrays": (head(keys=1) + key("a", 9) + struct.pack("<IQ", 9, 2) * 50, "bad-gguf"),
    "alignment 0": (head(keys=1) + key("general.alignment", 4) + bytes(4), "bad-gguf"),
    "alignment 24": (head(keys=1) + key("general.alignment", 4) + struct.pack("<I", 24), "bad-gguf"),
    "alignment in words": (head(keys=1) + key("general.alignment", 8) + gguf_text("32"), "bad-gguf"),
    "name too long": (head(tensors=1) + tensor("w" * 64) + bytes(256), "bad-gguf"),
    "tensor twice": (head(tensors=2) + tensor() + tensor(offset=128) + bytes(512), "bad-gguf"),
    "no dimensions": (head(tensors=1) + tensor(shape=()) + bytes(256), "bad-gguf"),
    "five dimensions": (head(tensors=1) + tensor(shape=(1,) * 5) + bytes(256), "bad-gguf"),
    "4 billion dimensions": (head(tensors=1) + gguf_text("w") + struct.pack("<I", 2**32 - 1) + bytes(99), "bad-gguf"),
    "a dimension of 0": (head(tensors=1) + tensor(shape=(32, 0)) + bytes(256), "bad-gguf"),
    "shape that overflows": (head(tensors=1) + tensor(shape=(2**32, 2**32)) + bytes(256), "bad-gguf"),
    "withdrawn type 31": (head(tensors=1) + tensor(kind=31) + bytes(256), "unknown-ggml-type"),
    "type 2^31": (head(tensors=1) + tensor(kind=2**31) + bytes(256), "unknown-ggml-type"),
    "half a block": (head(tensors=1) + tensor(shape=(40,), kind=8) + bytes(256), "bad-gguf"),
    "misaligned": (head(tensors=1) + tensor(offset=8) + bytes(256), "bad-gguf"),
    "overlap": (head(tensors=2) + tensor("a") + tensor("b", offset=64) + bytes(512), "bad-gguf"),
    "hole": (head(tensors=2) + tensor("a") + tensor("b", offset=1024) + bytes(4096), "bad-gguf"),
    "tensor beyond the file": (head(tensors=1) + tensor(shape=(2**20, 2**20)) + bytes(256), "truncated-gguf"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refuses_malformed_files_in_little_memory(case: str) -> None:
    content, code = BROKEN[case]
    tracemalloc.start()
    assert code_of(content) == code
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def parses_or_refuses(content: bytes) -> None:
    try:
        header = parse_header(content, len(content))
    except InputError as error:
        str(error).encode()
        return
    for found in header.tensors:
        assert found.offset + found.size_bytes <= len(content)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, len(VALID))
)
def test_mutated_files_parse_or_are_refused(changes: list[tuple[int, int]], end: int) -> None:
    mutated = bytearray(VALID)
    for position, value in changes:
        mutated[position] = value
    parses_or_refuses(bytes(mutated))
    parses_or_refuses(bytes(mutated[:end]))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 3), st.integers(0, 3))
def test_random_bodies_parse_or_are_refused(body: bytes, tensors: int, keys: int) -> None:
    parses_or_refuses(head(tensors=tensors, keys=keys) + body)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(GGUF_KINDS.values())), st.integers(0, 2**64 - 1), st.binary(max_size=100))
def test_lying_arrays_are_refused(kind: int, count: int, body: bytes) -> None:
    parses_or_refuses(head(keys=1) + key("a", 9) + struct.pack("<IQ", kind, count) + body)


def write_split(folder: Path, count: int = 3) -> Path:
    names = list(TENSORS)
    for number in range(count):
        split = {
            "split.no": ("u16", number),
            "split.count": ("u16", count),
            "split.tensors.count": ("i32", len(names)),
        }
        part = {name: TENSORS[name] for name in names[number::count]}
        content = gguf_bytes({**METADATA, **split} if number == 0 else split, part)
        (folder / f"m-{number + 1:05d}-of-{count:05d}.gguf").write_bytes(content)
    return folder / f"m-00001-of-{count:05d}.gguf"


def test_shards_become_one_model_from_any_of_them(tmp_path: Path) -> None:
    first = write_split(tmp_path)
    header = open_gguf(first)
    assert {tensor.name for tensor in header.tensors} == set(TENSORS)
    assert open_gguf(tmp_path / "m-00003-of-00003.gguf") == header
    assert header.file_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert len(header.files) == 3 and header.metadata["general.name"] == "Small Llama"


def test_shards_that_are_missing_or_foreign_are_refused(tmp_path: Path) -> None:
    first = write_split(tmp_path)
    second = tmp_path / "m-00002-of-00003.gguf"
    kept = second.read_bytes()
    second.write_bytes((tmp_path / "m-00003-of-00003.gguf").read_bytes())
    with pytest.raises(InputError, match="it is shard 2 of 3, not 1"):
        open_gguf(first)
    second.unlink()
    with pytest.raises(InputError) as caught:
        open_gguf(first)
    assert caught.value.code == "missing-shard" and "m-00002-of-00003.gguf" in caught.value.numbers
    (tmp_path / "renamed.gguf").write_bytes(kept)
    with pytest.raises(InputError, match="shard 1 of 3"):
        open_gguf(tmp_path / "renamed.gguf")


def test_a_missing_file_and_a_directory_are_errors(tmp_path: Path) -> None:
    for path, code in ((tmp_path / "no.gguf", "missing-file"), (tmp_path, "unreadable-file")):
        with pytest.raises(InputError) as caught:
            open_gguf(path)
        assert caught.value.code == code


def test_large_vocabularies_are_not_kept(tmp_path: Path) -> None:
    metadata, tensors = gguf_llama(vocab=64)
    metadata["tokenizer.ggml.tokens"] = ("arr", ("str", ["token"] * 100_000))
    path = tmp_path / "vocab.gguf"
    path.write_bytes(gguf_bytes(metadata, tensors))
    tracemalloc.start()
    header = open_gguf(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(header.metadata["tokenizer.ggml.tokens"], ArrayInfo)
    assert peak_bytes < 1 << 20


def test_write_gguf_builder_is_read_back(tmp_path: Path) -> None:
    assert len(open_gguf(write_gguf(tmp_path / "m.gguf", layers=3)).tensors) == 3 * 9 + 3
