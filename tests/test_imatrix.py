"""Importance matrices: files of both layouts, bad ones, texts, and what is collected against independent sums."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from planner.core.data import data_path
from planner.core.errors import InputError, StalePlan
from planner.core.model import Tensor
from planner.core.plan import BUILT_IN
from planner.execute import calibration
from planner.formats.imatrix import Importance, ImportanceMatrix, check_fits, read_imatrix, write_imatrix
from planner.methods.samples import choose_chunks
from planner.verify.importance import Collector
from tests.conftest import Qplan

NAMES = st.from_regex(r"blk\.[0-9]{1,2}\.(attn_q|ffn_down|ffn_up_exps)\.weight", fullmatch=True)


@st.composite
def matrices(draw: Any) -> ImportanceMatrix:
    entries = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        count, columns = draw(st.integers(1, 4)), draw(st.integers(1, 40))
        values = st.floats(0, 1e6, width=32, allow_subnormal=False)
        sums = draw(hnp.arrays(np.float32, (count, columns), elements=values))
        counts = draw(hnp.arrays(np.int64, count, elements=st.integers(0, 1 << 20)))
        entries[name] = Importance(sums=sums, counts=counts)
    return ImportanceMatrix(
        entries=entries, chunk_count=draw(st.integers(0, 999)), chunk_size=512, datasets=("a b.txt",)
    )


@settings(max_examples=40)
@given(matrices())
def test_a_matrix_survives_its_file(tmp_path_factory: pytest.TempPathFactory, matrix: ImportanceMatrix) -> None:
    path = tmp_path_factory.mktemp("matrix") / "m.gguf"
    write_imatrix(path, matrix)
    back = read_imatrix(path)
    assert set(back.entries) == set(matrix.entries)
    for name, entry in matrix.entries.items():
        assert np.array_equal(back.entries[name].sums, entry.sums)
        assert np.array_equal(back.entries[name].counts, entry.counts)
    assert (back.chunk_count, back.chunk_size, back.datasets) == (matrix.chunk_count, 512, ("a b.txt",))


def test_the_gguf_package_reads_what_is_written(tmp_path: Path) -> None:
    import gguf

    entry = Importance(sums=np.arange(6, dtype=np.float32).reshape(2, 3), counts=np.array([4, 0]))
    path = tmp_path / "m.gguf"
    write_imatrix(path, ImportanceMatrix(entries={"blk.0.x.weight": entry}, chunk_count=3, chunk_size=512))
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.chunk_count").contents() == 3
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert np.array_equal(found["blk.0.x.weight.in_sum2"], entry.sums)
    assert np.array_equal(found["blk.0.x.weight.counts"].reshape(-1), [4, 0])
    weights = read_imatrix(path).weights()["blk.0.x.weight"]
    assert weights.tolist() == [0, 0.25, 0.5, 1, 1, 1]  # an expert without tokens counts evenly


def dat(entries: dict[str, tuple[int, list[float]]], *, tail: bytes = b"") -> bytes:
    raw = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        raw += struct.pack(f"<{len(values)}f", *values)
    return raw + tail


def test_the_older_layout_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(dat({"blk.0.x.weight": (4, [4.0, 8.0])}, tail=struct.pack("<ii", 7, 5) + b"a.txt"))
    matrix = read_imatrix(path)
    assert matrix.weights()["blk.0.x.weight"].tolist() == [1.0, 2.0]
    assert matrix.chunk_count == 7 and matrix.datasets == ("a.txt",)
    path.write_bytes(dat({"blk.0.x.weight": (4, [4.0, 8.0])}))
    assert read_imatrix(path).chunk_count == 0


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"hello, this is a text and no matrix",
        dat({"blk.0.x.weight": (1, [1.0, 2.0])})[:-3],
        dat({"blk.0.x.weight": (1, [float("nan")])}),
        dat({"blk.0.x.weight": (1, [-1.0])}),
        struct.pack("<i", 1 << 30),
        b"GGUF" + bytes(20),
        b"GGUF",
    ],
)
def test_a_bad_file_is_an_error_and_no_traceback(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "m.dat"
    path.write_bytes(raw)
    with pytest.raises(InputError):
        read_imatrix(path)


@given(st.binary(max_size=400))
def test_no_bytes_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "m.dat"
    path.write_bytes(raw)
    with pytest.raises(InputError):
        read_imatrix(path)


def test_a_model_file_is_no_matrix_and_a_matrix_of_another_model_is_refused(tmp_path: Path) -> None:
    entry = Importance(sums=np.ones((1, 8), dtype=np.float32), counts=np.array([5]))
    matrix = ImportanceMatrix(entries={"blk.0.attn_q.weight": entry}, chunk_count=1, chunk_size=512)
    path = tmp_path / "m.gguf"
    assert check_fits(matrix, [Tensor("blk.0.attn_q.weight", (8, 4))], path) == 1
    for tensors in ([Tensor("blk.0.attn_q.weight", (16, 4))], [Tensor("blk.0.other.weight", (8, 4))]):
        with pytest.raises(InputError) as caught:
            check_fits(matrix, tensors, path)
        assert caught.value.code == "imatrix-other-model"


class FakeTensor:
    """What the collector asks of a tensor."""

    def __init__(self, name: str, shape: tuple[int, int, int, int], values: Any = None, type_id: int = 0) -> None:
        self.name, self.shape, self.values, self.type_id = name, shape, values, type_id

    def read(self) -> Any:
        return self.values


class FakeNode:
    def __init__(self, operation: str, *sources: FakeTensor) -> None:
        self.operation, self.sources = operation, sources

    def source(self, index: int) -> FakeTensor | None:
        return self.sources[index] if index < len(self.sources) else None


@pytest.mark.parametrize("slots", [1, 2])
def test_experts_are_summed_apart(slots: int) -> None:
    """Against plain loops; gate and up see one row for all chosen experts (``slots`` 1), down one for each."""
    rng = np.random.default_rng(3)
    experts, used, tokens, columns = 4, 2, 50, 8
    values = rng.standard_normal((1, tokens, slots, columns)).astype(np.float32)
    ids = np.stack([rng.choice(experts - 1, used, replace=False) for _ in range(tokens)]).astype(np.int32)
    weight = FakeTensor("blk.0.ffn_up_exps.weight", (columns, 16, experts, 1))
    collector = Collector()
    node: Any = FakeNode(
        "MUL_MAT_ID",
        weight,
        FakeTensor("x", (columns, slots, tokens, 1), values),
        FakeTensor("ids", (used, tokens, 1, 1), ids[None, None]),
    )
    assert collector(node, True) and collector(node, False)
    sums, counts = np.zeros((experts, columns)), np.zeros(experts, dtype=int)
    for token in range(tokens):
        for slot in range(used):
            sums[ids[token, slot]] += values[0, token, slot % slots].astype(np.float64) ** 2
            counts[ids[token, slot]] += 1
    assert np.allclose(collector.sums[weight.name], sums, rtol=1e-12)
    assert collector.counts[weight.name].tolist() == counts.tolist() and counts[-1] == 0
    entry = collector.matrix(chunk_count=1, chunk_size=512, dataset="", outputs=False).entries[weight.name]
    assert (entry.mean_squares()[-1] == 1).all()


def test_only_weights_with_a_batch_are_asked_for() -> None:
    def asks(operation: str, name: str, rows: int, type_id: int = 0) -> bool:
        node: Any = FakeNode(
            operation, FakeTensor(name, (8, 8, 1, 1)), FakeTensor("x", (8, rows, 1, 1), type_id=type_id)
        )
        return Collector()(node, True)

    assert asks("MUL_MAT", "blk.3.attn_q.weight", 512) and asks("MUL_MAT", "output.weight", 512)
    assert not asks("MUL_MAT", "blk.3.attn_q.weight", 15)
    assert not asks("MUL_MAT", "cache_k_l0 (view)", 512)
    assert not asks("MUL_MAT", "blk.3.attn_q.weight", 512, type_id=1)
    assert not asks("ADD", "blk.3.attn_q.weight", 512)


def test_chunks_are_whole_and_drawn_repeatably() -> None:
    tokens = list(range(1050))
    assert [chunk[0] for chunk in choose_chunks(tokens, 100, None, 0)] == list(range(0, 1000, 100))
    drawn = choose_chunks(tokens, 100, 3, 7)
    assert drawn == choose_chunks(tokens, 100, 3, 7) and len(drawn) == 3
    assert [chunk[0] for chunk in drawn] == sorted(chunk[0] for chunk in drawn)
    assert drawn != choose_chunks(tokens, 100, 3, 8)
    with pytest.raises(InputError) as caught:
        choose_chunks(tokens[:99], 100, None, 0)
    assert caught.value.code == "text-too-short"


def test_the_built_in_text_holds_nothing_that_quality_is_measured_on() -> None:
    text = calibration.text_of(data_path("calibration"))
    held_out = data_path("demo/heldout.txt").read_text("utf-8")
    long_ones = [line for line in held_out.splitlines() if len(line) > 60]
    assert len(long_ones) > 300 and not [line for line in long_ones if line in text]
    assert 100_000 < len(text.encode()) < 400_000


def test_a_text_is_pinned(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("one two three", encoding="utf-8")
    pinned = calibration.from_text(path, chunks=5, seed=2)
    assert calibration.text(pinned) == "one two three" and pinned.chunks == 5
    assert str(tmp_path) not in calibration.described(pinned)
    path.write_text("one two four", encoding="utf-8")
    with pytest.raises(StalePlan) as caught:
        calibration.text(pinned)
    assert caught.value.code == "calibration-changed"
    assert calibration.built_in().kind == BUILT_IN and calibration.text(calibration.built_in())


def test_a_folder_of_texts_and_bad_ones(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "c.bin", "README.md"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert calibration.text_of(tmp_path) == "a.md\nb.txt"
    (tmp_path / "a.md").write_bytes(b"\xff\xfe\x00")
    for bad in (tmp_path, tmp_path / "missing.txt", Path("/dev/null").parent):
        with pytest.raises(InputError):
            calibration.text_of(bad)


@pytest.fixture(scope="module")
def full_gguf(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path) -> Path:
    """The demo model in float32, so that only the arithmetic can differ."""
    from planner import convert

    path = tmp_path_factory.mktemp("full") / "demo-f32.gguf"
    convert.convert_checkpoint(demo_checkpoint, path, out_type="f32")
    return path


@pytest.mark.slow
def test_the_matrix_is_that_of_an_independent_computation(full_gguf: Path, tmp_path: Path, qplan: Qplan) -> None:
    """The same sums by transformers' forward hooks on the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = tmp_path / "text.txt"
    text.write_text(calibration.text_of(data_path("calibration/prose.txt"))[:12000], encoding="utf-8")
    made = tmp_path / "imatrix.gguf"
    done = qplan("imatrix", str(full_gguf), "--text", str(text), "--outputs", "-o", str(made), "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    matrix = read_imatrix(made)
    tokenizer = AutoTokenizer.from_pretrained(data_path("demo/model"))
    ids = tokenizer(text.read_text("utf-8"))["input_ids"]
    chunks = [[1, *ids[i : i + 512][1:]] for i in range(0, len(ids) - 511, 512)]
    assert answer["chunks"] == len(chunks) > 3 and answer["tokens"] == 512 * len(chunks)
    model = AutoModelForCausalLM.from_pretrained(data_path("demo/model"), dtype=torch.float32).eval()
    sums: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].double().square().sum((0, 1)).numpy()

        return hook

    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    parts |= {"mlp.down_proj": "ffn_down"}
    for i, layer in enumerate(model.model.layers):
        for path, part in parts.items():
            layer.get_submodule(path).register_forward_pre_hook(watch(f"blk.{i}.{part}.weight"))
    model.lm_head.register_forward_pre_hook(watch("output.weight"))
    with torch.no_grad():
        for chunk in chunks:
            model(torch.tensor([chunk]))
    assert set(sums) == set(matrix.entries)
    for name, wanted in sums.items():
        entry = matrix.entries[name]
        assert entry.counts.tolist() == [512 * len(chunks)]
        assert np.allclose(entry.sums[0], wanted, rtol=5e-3), name


@pytest.mark.slow
def test_the_verb_refuses_what_it_should(tmp_path: Path, qplan: Qplan) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_text("my notes")
    done = qplan("imatrix", "demo", "-o", str(mine))
    assert done.returncode == 1 and "output-exists" in done.stderr and mine.read_text() == "my notes"
    short = tmp_path / "short.txt"
    short.write_text("too short")
    done = qplan("imatrix", "demo", "--text", str(short), "-o", str(tmp_path / "m.gguf"))
    assert done.returncode == 1 and "text-too-short" in done.stderr and "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"mine.gguf", "short.txt"}
    done = qplan("imatrix", "llama-2-7b", "-o", str(tmp_path / "m.gguf"))
    assert done.returncode == 1 and "not-local" in done.stderr
