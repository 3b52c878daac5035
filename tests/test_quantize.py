"""One pass against two steps, byte by byte; resuming, damage, full disks; what the kernels are given."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.convert import convert_checkpoint
from planner.core.errors import ExecutionFailed, InputError, QplanError, StalePlan, UsageError
from planner.core.job import journal_path, keeps_progress, partial_path
from planner.formats import ggml
from planner.models.fingerprint import sha256_of
from planner.quantize import demands_importance, engine, kernels, pipeline, quantize_checkpoint, work
from tests import quantize_fixtures as make
from tests.conftest import Qplan

needs_ggml = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
pytestmark = [needs_ggml, pytest.mark.slow]

TYPES = ("Q8_0", "Q4_0", "Q5_1", "Q4_K_M", "Q6_K", "Q3_K_L", "Q2_K", "IQ4_XS", "IQ3_M", "F16", "F32", "TQ2_0", "Q1_0")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-3.1": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-moe": {
        "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 512,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 64},
    "qwen3-moe": {
        "model_type": "qwen3_moe", "head_dim": 64, "num_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
    },
    "gemma-2": {"model_type": "gemma2", "head_dim": 64, "sliding_window": 16},
    "gemma-3": {"model_type": "gemma3_text", "head_dim": 64, "sliding_window": 16},
    "phi-3": {"model_type": "phi3"},
    "granite": {"model_type": "granite", "logits_scaling": 8.0},
}  # fmt: skip


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that gives the checkpoint of a family in a type, made once: several shards of random weights."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, dtype: str = "BF16") -> Path:
        if (family, dtype) not in made:
            directory = tmp_path_factory.mktemp("random") / f"{family}-{dtype}"
            make.checkpoints().write_checkpoint(
                directory, {**make.SHAPE, **FAMILIES[family]}, dtype=dtype, shard_bytes=1 << 20
            )
            made[family, dtype] = directory
        return made[family, dtype]

    return get


def one_pass(directory: Path, folder: Path, types: tuple[str, ...], **options: Any) -> dict[str, bytes]:
    targets = tuple(make.target(directory, folder / f"one-{type_}.gguf", type_) for type_ in types)
    quantize_checkpoint(directory, targets, **options)
    return {type_: target.output.read_bytes() for type_, target in zip(types, targets, strict=True)}


def test_every_type_from_one_read_is_byte_for_byte_that_of_two_steps(demo_checkpoint: Path, tmp_path: Path) -> None:
    made = one_pass(demo_checkpoint, tmp_path, TYPES, threads=2)
    for type_ in TYPES:
        assert made[type_] == make.two_steps(demo_checkpoint, tmp_path / "two.gguf", type_), type_
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_byte_for_byte_that_of_two_steps(
    random_checkpoint: Any, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the tokenizer is the demo model's, which is not how Gemma adds a space; tokenizers have tests of their own
    monkeypatch.setattr(engine, "require_same_tokens", lambda *_: engine_check())
    directory = random_checkpoint(family)
    assert len(list(directory.glob("*.safetensors"))) > 1
    types = ("Q4_K_M", "Q8_0", "Q2_K", "MXFP4_MOE")
    made = one_pass(directory, tmp_path, types, threads=2)
    for type_ in types:
        assert made[type_] == make.two_steps(directory, tmp_path / "two.gguf", type_), type_


def test_an_output_matrix_that_is_tied_and_stored_is_left_out(random_checkpoint: Any, tmp_path: Path) -> None:
    directory = tmp_path / "llama-BF16"
    shutil.copytree(random_checkpoint("llama"), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    (made,) = one_pass(directory, tmp_path, ("Q4_K_M",)).values()
    assert made == make.two_steps(directory, tmp_path / "two.gguf", "Q4_K_M")
    assert "output.weight" not in tensor_data(tmp_path / "two.gguf")


def engine_check() -> Any:
    from planner.convert.check import TokenizerCheck

    return TokenizerCheck(same=True, detail="not compared")


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_source_types_go_through_f16(random_checkpoint: Any, dtype: str, tmp_path: Path) -> None:
    directory = random_checkpoint("llama", dtype)
    made = one_pass(directory, tmp_path, ("Q4_K_M", "Q8_0"), threads=2)
    for type_, found in made.items():
        assert found == make.two_steps(directory, tmp_path / "two.gguf", type_, out_type="f16"), type_


@pytest.mark.parametrize("through", ["F16", "F32", "BF16"])
def test_through_names_the_type_in_between(random_checkpoint: Any, through: str, tmp_path: Path) -> None:
    directory = random_checkpoint("llama", "F32")
    made = one_pass(directory, tmp_path, ("Q5_K_M",), through=through)
    assert made["Q5_K_M"] == make.two_steps(directory, tmp_path / "two.gguf", "Q5_K_M", out_type=through.lower())


def test_bfloat16_is_quantized_from_its_exact_values(random_checkpoint: Any, tmp_path: Path) -> None:
    """By way of F16 weights below 2**-14 would be rounded: another file."""
    directory = tmp_path / "llama-BF16"
    shutil.copytree(random_checkpoint("llama"), directory)
    for shard in directory.glob("*.safetensors"):
        data = shard.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        bits = np.frombuffer(data[start:], "<u2")
        smaller = np.where(bits & 0x7F80 > 9 << 7, bits - (9 << 7), bits).astype("<u2")  # times 2**-9
        shard.write_bytes(data[:start] + smaller.tobytes())
    (made,) = one_pass(directory, tmp_path, ("Q8_0",)).values()
    assert made == make.two_steps(directory, tmp_path / "two.gguf", "Q8_0", out_type="f32")
    assert made != make.two_steps(directory, tmp_path / "two.gguf", "Q8_0", out_type="f16")


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_importance_weighted_types_are_llamacpps(random_checkpoint: Any, family: str, tmp_path: Path) -> None:
    directory = random_checkpoint(family)
    importance = make.random_importance(directory)
    for type_ in ("IQ1_M", "IQ2_XXS", "IQ2_M", "IQ3_XXS", "Q2_K_S", "Q4_0", "Q4_K_M", "IQ4_XS"):
        target = make.target(directory, tmp_path / "one.gguf", type_, importance)
        quantize_checkpoint(directory, (target,), threads=2)
        wanted = make.two_steps(directory, tmp_path / "two.gguf", type_, importance=importance)
        assert target.output.read_bytes() == wanted, type_


def test_types_that_need_an_importance_matrix_are_refused_without(random_checkpoint: Any, tmp_path: Path) -> None:
    directory = random_checkpoint("llama")
    for type_ in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "Q2_K_S"):
        with pytest.raises(InputError) as caught:
            one_pass(directory, tmp_path, (type_,))
        assert caught.value.code == "needs-imatrix", type_
    lacking = dict(list(make.random_importance(directory).items())[:3])
    with pytest.raises(InputError) as caught:
        quantize_checkpoint(directory, (make.target(directory, tmp_path / "x.gguf", "IQ2_XXS", lacking),))
    assert caught.value.code == "needs-imatrix"
    short = {name: values[:-1] for name, values in make.random_importance(directory).items()}
    with pytest.raises(InputError) as caught:
        quantize_checkpoint(directory, (make.target(directory, tmp_path / "x.gguf", "Q4_K_M", short),))
    assert caught.value.code == "bad-importance"
    assert list(tmp_path.iterdir()) == []


def test_any_recipe_of_types_is_carried_out(random_checkpoint: Any, tmp_path: Path) -> None:
    """A mix that no file type has, beside one with tensors in common."""
    directory = random_checkpoint("llama")
    draw = random.Random(1)
    plain = make.target(directory, tmp_path / "plain.gguf", "Q4_K_M")
    mixed = {
        name: draw.choice(("Q3_K", "Q5_1", "Q6_K", "IQ4_NL", "F16")) if "norm" not in name else type_
        for name, type_ in plain.types.items()
    }
    recipe = dataclasses.replace(plain, output=tmp_path / "mixed.gguf", types=mixed)
    quantize_checkpoint(directory, (recipe, plain), threads=2)
    from planner.formats.gguf import open_gguf

    assert {tensor.name: tensor.type for tensor in open_gguf(recipe.output).tensors} == mixed
    assert plain.output.read_bytes() == make.two_steps(directory, tmp_path / "two.gguf", "Q4_K_M")


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_bytes_depend_on_neither_threads_nor_blocks(
    random_checkpoint: Any, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(pipeline, "SMALLEST_BLOCK_BYTES", 3000)
    monkeypatch.setattr(work, "SLAB_WEIGHTS", 1500)
    for family in ("llama", "mixtral"):
        directory = random_checkpoint(family)
        made = one_pass(directory, tmp_path, ("Q4_K_M",), threads=threads)
        assert made["Q4_K_M"] == make.two_steps(directory, tmp_path / "two.gguf", "Q4_K_M")
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def test_the_checkpoint_is_read_once_for_all_types(random_checkpoint: Any, tmp_path: Path) -> None:
    directory = random_checkpoint("llama")
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    types = ("Q8_0", "Q4_K_M", "Q6_K", "Q5_K_M", "Q4_0", "Q3_K_M")
    targets = tuple(make.target(directory, tmp_path / type_, type_) for type_ in types)
    before = system_bytes_read()
    result = quantize_checkpoint(directory, targets, threads=2)
    assert result.read_bytes == size
    assert result.source_sha256 == {path.name: sha256_of(path) for path in directory.glob("*.safetensors")}
    sides = sum(path.stat().st_size for path in directory.iterdir() if path.suffix != ".safetensors")
    if before is not None:  # as the system counts: the weights, the tokenizer a few times, ggml's library
        assert system_bytes_read() - before < size + 6 * sides + (16 << 20)


def system_bytes_read() -> Any:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


KILLED = """
import sys
from pathlib import Path
from planner.quantize import pipeline, quantize_checkpoint
from tests import quantize_fixtures as make
pipeline.BLOCK_BYTES = pipeline.SMALLEST_BLOCK_BYTES = 20000
directory, folder = Path(sys.argv[1]), Path(sys.argv[2])
targets = tuple(make.target(directory, folder / (type_ + ".gguf"), type_) for type_ in ("IQ4_XS", "Q4_K_M"))
result = quantize_checkpoint(directory, targets, threads=2, checkpoint_seconds=0.03)
print(result.resumed_units, result.read_bytes)
"""


def test_killed_at_any_moment_it_goes_on_and_makes_the_same_bytes(random_checkpoint: Any, tmp_path: Path) -> None:
    directory = random_checkpoint("mixtral")
    wanted = {t: make.two_steps(directory, tmp_path / "two.gguf", t) for t in ("IQ4_XS", "Q4_K_M")}
    folder = tmp_path / "out"
    folder.mkdir()
    command = [sys.executable, "-c", KILLED, str(directory), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(make.ROOT)}
    draw, progressed = random.Random(5), 0
    for _ in range(12):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        journal = journal_path(folder / "IQ4_XS.gguf")
        before = journal.stat().st_size if journal.exists() else 0
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > before + 200):
            time.sleep(0.005)
        time.sleep(draw.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if not journal.exists():
            break  # it was done before the signal came
        assert not list(folder.glob("*.gguf"))
        progressed += 1
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    resumed, read = map(int, done.stdout.split())
    assert progressed
    if resumed:  # shards that were done are not even read again
        assert read < sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert {path.name for path in folder.iterdir()} == {"IQ4_XS.gguf", "Q4_K_M.gguf"}
    for type_, data in wanted.items():
        assert (folder / f"{type_}.gguf").read_bytes() == data


def test_killed_between_two_renames_it_finishes(random_checkpoint: Any, tmp_path: Path, monkeypatch: Any) -> None:
    directory = random_checkpoint("llama")
    wanted = one_pass(directory, tmp_path, ("Q8_0", "Q4_0"))
    for path in tmp_path.iterdir():
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_finish", interrupt_after_one_rename)
        with pytest.raises(KeyboardInterrupt):
            one_pass_with_progress(directory, tmp_path, ("Q8_0", "Q4_0"))
    assert (tmp_path / "one-Q8_0.gguf").exists() and not (tmp_path / "one-Q4_0.gguf").exists()
    assert one_pass(directory, tmp_path, ("Q8_0", "Q4_0")) == wanted
    assert not list(tmp_path.glob(".*"))


def interrupt_after_one_rename(run: Any) -> None:
    run.layouts[0].partial.replace(run.layouts[0].target.output)
    raise KeyboardInterrupt


def one_pass_with_progress(directory: Path, folder: Path, types: tuple[str, ...]) -> None:
    one_pass(directory, folder, types, checkpoint_seconds=0.0)


def test_an_interruption_before_any_progress_leaves_nothing(random_checkpoint: Any, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one_pass(random_checkpoint("llama"), tmp_path, ("Q8_0",), progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["type", "weights", "journal", "partial"])
def test_what_is_left_of_another_run_is_not_taken_over(
    random_checkpoint: Any, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "llama-BF16"
    shutil.copytree(random_checkpoint("llama"), directory)
    output = tmp_path / "out.gguf"

    def interrupt(done: int, total: int) -> None:
        if keeps_progress(output):
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "BLOCK_BYTES", 20000)
    monkeypatch.setattr(pipeline, "SMALLEST_BLOCK_BYTES", 20000)
    quick = {"checkpoint_seconds": 0.0, "progress": interrupt}
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(directory, (make.target(directory, output, "IQ4_XS"),), **quick)  # type: ignore[arg-type]
    assert journal_path(output).exists() and partial_path(output).exists()
    type_ = "IQ4_XS"
    if change == "type":
        type_ = "Q8_0"
    elif change == "weights":
        shard = sorted(directory.glob("*.safetensors"))[0]
        data = bytearray(shard.read_bytes())
        data[-7] ^= 1
        shard.write_bytes(data)
    elif change == "journal":
        journal_path(output).write_bytes(journal_path(output).read_bytes()[:-30] + b'{"units":[[0,')
    else:
        with partial_path(output).open("r+b") as file:
            file.truncate(1000)
    quantize_checkpoint(directory, (make.target(directory, output, type_),))
    assert output.read_bytes() == make.two_steps(directory, tmp_path / "two.gguf", type_)


def test_two_runs_into_one_file_do_not_meet(random_checkpoint: Any, tmp_path: Path) -> None:
    directory = random_checkpoint("llama")

    def again(done: int, total: int) -> None:
        with pytest.raises(ExecutionFailed) as caught:
            one_pass(directory, tmp_path, ("Q8_0",))
        assert caught.value.code == "locked"

    assert one_pass(directory, tmp_path, ("Q8_0",), progress=again)


def damaged(random_checkpoint: Any, folder: Path, edit: Any) -> Path:
    directory = folder / "llama-BF16"
    shutil.copytree(random_checkpoint("llama"), directory)
    shard = sorted(directory.glob("*.safetensors"))[-1]
    edit(shard)
    return directory


def test_a_weight_file_that_is_not_the_pinned_one_is_refused(random_checkpoint: Any, tmp_path: Path) -> None:
    directory = random_checkpoint("llama")
    pins = {path.name: sha256_of(path) for path in directory.glob("*.safetensors")}
    out = tmp_path / "out"
    out.mkdir()
    one_pass(directory, out, ("Q8_0",), pins=pins)
    (out / "one-Q8_0.gguf").unlink()
    last = max(pins)
    with pytest.raises(StalePlan) as caught:
        one_pass(directory, out, ("Q8_0",), pins={**pins, last: "0" * 64})
    assert caught.value.code == "model-changed" and last in caught.value.what
    assert list(out.iterdir()) == []


def test_weights_that_are_no_numbers_are_refused(random_checkpoint: Any, tmp_path: Path) -> None:
    def poison(shard: Path) -> None:
        data = bytearray(shard.read_bytes())
        data[-2:] = b"\xc0\x7f"  # a bfloat16 NaN
        shard.write_bytes(data)

    directory = damaged(random_checkpoint, tmp_path, poison)
    out = tmp_path / "out"
    out.mkdir()
    for type_ in ("Q8_0", "Q4_K_M", "IQ4_XS"):
        with pytest.raises(InputError) as caught:
            one_pass(directory, out, (type_,), threads=2)
        assert caught.value.code == "not-finite"
        assert list(out.iterdir()) == []


def test_a_shard_that_is_cut_short_while_it_is_read(random_checkpoint: Any, tmp_path: Path) -> None:
    directory = damaged(random_checkpoint, tmp_path, lambda shard: None)
    last = sorted(directory.glob("*.safetensors"))[-1]
    out = tmp_path / "out"
    out.mkdir()

    def cut(done: int, total: int) -> None:
        os.truncate(last, 5000)

    with pytest.raises(InputError) as caught:
        targets = (make.target(directory, out / "x.gguf", "IQ4_XS"),)
        os_truncated = engine._begin
        engine._begin = lambda *a: (cut(0, 0), os_truncated(*a))[1]  # type: ignore[assignment]
        try:
            quantize_checkpoint(directory, targets)
        finally:
            engine._begin = os_truncated
    assert caught.value.code == "truncated-safetensors"
    assert list(out.iterdir()) == []
    with pytest.raises(InputError):
        one_pass(directory, out, ("Q8_0",))


def test_a_full_disk_shows_before_the_work_and_leaves_nothing(demo_checkpoint: Path, small_disk: Path) -> None:
    with pytest.raises(ExecutionFailed) as caught:
        one_pass(demo_checkpoint, small_disk, ("Q4_K_M",))
    assert caught.value.code == "no-space" and "free" in caught.value.numbers
    assert list(small_disk.iterdir()) == []


BIG = """
import json, sys
from pathlib import Path
from planner.execute.resident import peak_resident_bytes, resident_bytes
from planner.quantize import quantize_checkpoint
from tests import quantize_fixtures as make
directory, folder = Path(sys.argv[1]), Path(sys.argv[2])
targets = tuple(make.target(directory, folder / t, t) for t in ("Q8_0", "Q4_0"))
result = quantize_checkpoint(directory, targets, threads=2)
print(json.dumps([peak_resident_bytes(), result.read_bytes]))
"""


def test_memory_is_bounded_for_a_model_of_two_gigabytes(tmp_path: Path) -> None:
    """Weights of zeros in a sparse file: as much to read, no disk."""
    directory = sparse_checkpoint(tmp_path / "big")
    environment = {**os.environ, "PYTHONPATH": str(make.ROOT)}
    command = [sys.executable, "-c", BIG, str(directory), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    peak, read = json.loads(done.stdout)
    assert read > 2e9
    assert peak < 400 << 20


def sparse_checkpoint(directory: Path) -> Path:
    config = {**make.SHAPE, "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
              "num_hidden_layers": 17, "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
    module = make.checkpoints()
    tiny = {**config, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    module.write_checkpoint(directory, tiny)
    stated = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**stated, **config}))
    header, offset = {}, 0
    for name, shape in module.tensor_shapes(config):
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with next(directory.glob("*.safetensors")).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return directory


@given(
    type_=st.sampled_from(("Q8_0", "Q4_0", "Q4_K", "Q6_K", "Q3_K", "IQ4_XS", "Q5_1", "BF16")),
    rows=st.integers(1, 12),
    cuts=st.lists(st.integers(1, 11), max_size=4),
    weighted=st.booleans(),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_rows_can_be_split_anywhere(type_: str, rows: int, cuts: list[int], weighted: bool, seed: int) -> None:
    library, draw = kernels.load(), np.random.default_rng(seed)
    values = draw.standard_normal((rows, 512), dtype=np.float32)
    importance = draw.exponential(1.0, 512).astype(np.float32) if weighted else None
    width = ggml.row_bytes(type_, 512)
    whole, parts = np.empty(rows * width, np.uint8), np.empty(rows * width, np.uint8)
    library.quantize(values, type_, whole, importance, name="x")
    ends = sorted({cut for cut in cuts if cut < rows} | {0, rows})
    for start, end in itertools.pairwise(ends):
        library.quantize(values[start:end], type_, parts[start * width : end * width], importance, name="x")
    assert np.array_equal(whole, parts)


def test_what_would_end_the_process_is_refused_before() -> None:
    library = kernels.load()
    values, room = np.zeros((2, 256), np.float32), np.empty(2 * 66, np.uint8)
    wrong: list[tuple[Any, str, Any, Any]] = [
        (values, "IQ2_XXS", room, None),
        (values, "IQ2_XXS", room, np.ones(255, np.float32)),
        (values, "IQ2_XXS", room[:-1], np.ones(256, np.float32)),
        (values[:, :200], "Q4_K", room, None),
        (values.T, "Q8_0", room, None),
        (values.astype(np.float64), "Q8_0", np.empty(2 * 272, np.uint8), None),
        (values, "Q8_K", room, None),
        (values, "I8", room, None),
    ]
    for given_values, type_, out, importance in wrong:
        with pytest.raises(QplanError):
            library.quantize(given_values, type_, out, importance, name="x")


def test_which_types_demand_an_importance_matrix() -> None:
    assert demands_importance("blk.0.attn_q.weight", "IQ2_S") and demands_importance("blk.0.attn_q.weight", "IQ3_XXS")
    assert not demands_importance("token_embd.weight", "IQ2_S") and demands_importance("token_embd.weight", "IQ2_XS")
    assert not demands_importance("blk.0.attn_q.weight", "Q2_K")
    assert demands_importance("blk.0.attn_q.weight", "Q2_K", low_bit_mix=True)


def test_types_of_another_model_are_refused(random_checkpoint: Any, tmp_path: Path) -> None:
    directory = random_checkpoint("llama")
    target = make.target(directory, tmp_path / "x.gguf", "Q4_0")
    fewer = {name: type_ for name, type_ in target.types.items() if "attn_q" not in name}
    with pytest.raises(UsageError) as caught:
        quantize_checkpoint(directory, (dataclasses.replace(target, types=fewer),))
    assert caught.value.code == "missing-type"
    with pytest.raises(InputError):
        odd = {**target.types, "blk.0.attn_norm.weight": "Q4_0"}
        quantize_checkpoint(directory, (dataclasses.replace(target, types=odd),))
    with pytest.raises(UsageError):
        quantize_checkpoint(directory, (target, target))
    assert list(tmp_path.iterdir()) == []


def test_the_verb_makes_several_files(qplan: Qplan, demo_checkpoint: Path, tmp_path: Path) -> None:
    done = qplan("quantize", "demo", "--types", "Q4_K_M,q8_0", "-o", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [file["type"] for file in told["files"]] == ["Q4_K_M", "Q8_0"]
    for file in told["files"]:
        made = Path(file["path"])
        wanted = make.two_steps(demo_checkpoint, tmp_path / "two.gguf", file["type"])
        assert tensor_data(made) == tensor_data(tmp_path / "two.gguf") and file["bytes"] == made.stat().st_size
        assert len(wanted) == pytest.approx(file["predicted_bytes"], rel=0.005)
    assert told["read_bytes"] == (demo_checkpoint / "model.safetensors").stat().st_size
    again = qplan("quantize", "demo", "--type", "Q8_0", "-o", str(tmp_path / "out"))
    assert again.returncode == 1 and "--force" in again.stderr
    assert qplan("quantize", "demo", "--type", "Q8_0", "-o", str(tmp_path / "out"), "--force").returncode == 0
    assert qplan("quantize", "demo", "--type", "Q8_0", "--dry-run", "-o", str(tmp_path / "none")).returncode == 0
    assert not (tmp_path / "none").exists()
    refused = qplan("quantize", str(tmp_path / "out" / "demo-Q8_0.gguf"), "--type", "Q4_0")
    assert refused.returncode == 2 and "not-a-checkpoint" in refused.stderr


def tensor_data(path: Path) -> dict[str, bytes]:
    from planner.formats.gguf import open_gguf

    data = path.read_bytes()
    return {t.name: data[t.offset : t.offset + t.size_bytes] for t in open_gguf(path).tensors}


def test_the_reference_comes_from_memory_or_a_nameless_file(demo_checkpoint: Path, tmp_path: Path) -> None:
    from planner.verify.reference import Source, sixteen_bit

    convert_checkpoint(demo_checkpoint, tmp_path / "wanted.gguf")
    wanted = (tmp_path / "wanted.gguf").read_bytes()
    folder = tmp_path / "out"
    folder.mkdir()
    source = Source(checkpoint=demo_checkpoint, folder=folder, memory_bytes=1 << 30)
    said = []
    for memory in (1 << 30, 1 << 20, None):
        with sixteen_bit(dataclasses.replace(source, memory_bytes=memory), lambda *_: None) as (path, note):
            assert path.read_bytes() == wanted
            assert list(folder.iterdir()) == [] or sys.platform != "linux"
            said.append(note)
    assert ("memory" in said[0] or sys.platform != "linux") and "temporary file" in said[1]
    assert list(folder.iterdir()) == []
    with sixteen_bit(dataclasses.replace(source, keep=folder / "kept.gguf"), lambda *_: None) as (path, _):
        assert path == folder / "kept.gguf"
    assert path.read_bytes() == wanted


def fp8_checkpoint(directory: Path, source: Path, scaling: str, suffix: str = "_scale_inv") -> dict[str, Any]:
    """The bfloat16 checkpoint ``source`` with its layers' matrices in E4M3; their values as llama.cpp reads them."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    directory.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors" and "index" not in path.name:
            shutil.copy(path, directory / path.name)
    config = json.loads((source / "config.json").read_text())
    block = [128, 128] if scaling == "blocks" else None
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": block, "activation_scheme": "dynamic"}
    (directory / "config.json").write_text(json.dumps(config))
    stored: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                weights = file.get_tensor(name)
                if ".layers." not in name or weights.ndim != 2:
                    stored[name] = plain[name] = weights
                    continue
                rows, columns = weights.shape
                wide = weights.float()
                if scaling == "blocks":
                    high, across = -(-rows // 128), -(-columns // 128)
                    padded = torch.zeros(high * 128, across * 128)
                    padded[:rows, :columns] = wide
                    scale = padded.view(high, 128, across, 128).abs().amax((1, 3)).clamp(min=1e-9) / 448
                    factors = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
                elif scaling == "rows":
                    scale = wide.abs().amax(1, keepdim=True) / 448
                    factors = scale
                else:
                    scale = (wide.abs().max() / 448).reshape(1)
                    factors = scale
                stored[name] = (wide / factors).to(torch.float8_e4m3fn)
                stored[name + suffix] = scale
                plain[name] = stored[name].float() * factors
    save_file(stored, directory / "model.safetensors")
    return plain


@pytest.mark.skipif(not (find_spec("torch") and find_spec("safetensors")), reason="needs torch and safetensors")
@pytest.mark.parametrize("scaling", ["blocks", "rows", "tensor"])
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_fp8_weights_are_scaled_and_go_through_f16(
    random_checkpoint: Any, tmp_path: Path, scaling: str, family: str
) -> None:
    from safetensors.torch import save_file

    source = random_checkpoint(family)
    directory, plain_directory = tmp_path / "fp8", tmp_path / "plain"
    plain = fp8_checkpoint(directory, source, scaling, "_scale" if scaling == "rows" else "_scale_inv")
    shutil.copytree(source, plain_directory, ignore=shutil.ignore_patterns("model*"))
    save_file({name: weights.float() for name, weights in plain.items()}, plain_directory / "model.safetensors")
    for through in ("F32", "F16"):
        made = one_pass(directory, tmp_path, ("Q4_K_M", "Q8_0"), threads=2, through=through)
        for type_, found in made.items():
            make.two_steps(plain_directory, tmp_path / "two.gguf", type_, out_type=through.lower())
            (tmp_path / "found.gguf").write_bytes(found)
            assert tensor_data(tmp_path / "found.gguf") == tensor_data(tmp_path / "two.gguf")


@pytest.mark.skipif(
    not all(find_spec(name) for name in ("torch", "safetensors", "transformers")), reason="needs torch and transformers"
)
@pytest.mark.parametrize("scaling", ["blocks", "tensor"])
def test_fp8_is_what_llamacpps_own_converter_reads(random_checkpoint: Any, tmp_path: Path, scaling: str) -> None:
    from tests.convert_fixtures import find_llama_cpp_source, script_convert

    directory = tmp_path / "fp8"
    fp8_checkpoint(directory, random_checkpoint("llama"), scaling)
    script_convert(find_llama_cpp_source(), directory, tmp_path / "f16.gguf", "f16", pre="default")
    make.quantize_file(tmp_path / "f16.gguf", tmp_path / "two.gguf", "Q4_K_M")
    (made,) = one_pass(directory, tmp_path, ("Q4_K_M",), through="F16").values()
    (tmp_path / "one.gguf").write_bytes(made)
    assert tensor_data(tmp_path / "one.gguf") == tensor_data(tmp_path / "two.gguf")
