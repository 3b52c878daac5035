"""Which program makes what, what a person may ask for, and conversion between float types. Without torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import methods, models
from planner.core.candidate import Variant
from planner.core.errors import InputError, UsageError
from planner.core.job import Job, journal_path, partial_path
from planner.core.model import ModelSpec
from planner.core.plan import Step
from planner.core.workload import Quantizing, Workload
from planner.execute import artifacts, environments
from planner.formats.safetensors import open_checkpoint, read_tensor_bytes
from planner.methods import (
    awq,
    bitsandbytes,
    directory_run,
    gptq,
    none,
    none_run,
    quantizers,
    scripts,
    serving,
    torch_run,
    wishes,
)
from planner.models import catalog


def model() -> ModelSpec:
    found = catalog.lookup("tinyllama-1.1b")
    assert found is not None
    return found


@pytest.mark.parametrize("way", quantizers.ways(), ids=lambda way: f"{way.method}-{way.quantizer}-{way.format}")
def test_every_way_has_a_method_a_reason_and_an_environment(way: quantizers.Way) -> None:
    row = quantizers.quantizer(way.quantizer)
    assert methods.row(way.method).executable and way.why
    assert row.source and row.date and row.licence
    if row.environment is None:
        return
    environment = environments.row(row.environment)
    assert way.method in environment.methods or way.types == ("fp8",)
    assert f"{row.packages[0]}=={row.version}" in environment.requires


@pytest.mark.parametrize("name", ["awq", "gptq", "bitsandbytes", "none"])
def test_all_that_is_proposed_can_be_made(name: str) -> None:
    for variant in methods.get(name).variants(model()):
        (quantize, verify) = methods.get(name).steps(model(), variant)
        assert quantize.output == serving.artifact_name(model(), variant)
        assert quantize.settings == quantizers.settings(variant)
        assert verify.source == "quantize"


def test_a_type_that_nothing_makes_is_estimated_only() -> None:
    variant = awq.variant("3bit")
    assert quantizers.way_of(variant) is None
    assert awq.steps(model(), variant)[0].settings is None
    with pytest.raises(UsageError):
        quantizers.settings(variant)


@pytest.mark.parametrize(
    ("variant", "wish", "quantizer", "format_"),
    [
        (gptq.variant("4bit"), Quantizing(), "gptqmodel", "gptq"),
        (gptq.variant("4bit"), Quantizing(quantizer="llm-compressor"), "llm-compressor", "compressed-tensors"),
        (gptq.variant("3bit"), Quantizing(symmetric=False, group_size=64), "gptqmodel", "gptq"),
        (awq.variant("4bit"), Quantizing(), "gptqmodel", "awq-gemm"),
        (awq.variant("4bit"), Quantizing(quantizer="autoawq"), "autoawq", "awq-gemm"),
        (awq.variant("4bit"), Quantizing(layout="gemv"), "autoawq", "awq-gemv"),
        (awq.variant("4bit"), Quantizing(symmetric=True), "llm-compressor", "compressed-tensors"),
        (none.variant("fp8"), Quantizing(), "llm-compressor", "compressed-tensors"),
        (none.variant("bf16"), Quantizing(), "qplan", "safetensors"),
    ],
)
def test_the_first_way_that_makes_it_is_taken(variant: Variant, wish: Quantizing, quantizer: str, format_: str) -> None:
    made = quantizers.wished(variant, wish)
    assert quantizers.settings(made).quantizer == quantizer
    assert made.format == format_


@pytest.mark.parametrize(
    ("variant", "wish"),
    [
        (gptq.variant("3bit"), Quantizing(quantizer="llm-compressor")),
        (gptq.variant("4bit"), Quantizing(quantizer="llm-compressor", act_order=True)),
        (gptq.variant("4bit"), Quantizing(quantizer="autoawq")),
        (gptq.variant("4bit"), Quantizing(group_size=48)),
        (awq.variant("4bit"), Quantizing(quantizer="autoawq", symmetric=True)),
        (awq.variant("4bit"), Quantizing(layout="gemv", group_size=-1)),
        (bitsandbytes.variant("nf4"), Quantizing(quantizer="gptqmodel")),
    ],
)
def test_what_nothing_makes_is_refused_with_what_there_is(variant: Variant, wish: Quantizing) -> None:
    with pytest.raises(UsageError) as caught:
        quantizers.wished(variant, wish)
    assert caught.value.code == "no-quantizer" and caught.value.numbers and caught.value.hint
    with pytest.raises(UsageError) as caught:
        quantizers.wished(variant, Quantizing(quantizer="llama.cpp"))
    assert caught.value.code == "unknown-quantizer"


def test_wishes_touch_only_what_they_are_about() -> None:
    wish = Quantizing(act_order=True, symmetric=False, double_quantization=False, compute_dtype="float16")
    assert quantizers.wished(gptq.variant("4bit", act_order=False), wish).act_order
    nf4 = quantizers.wished(bitsandbytes.variant("nf4"), wish)
    assert (nf4.double_quantization, nf4.compute_dtype) == (False, "float16")
    int8 = bitsandbytes.variant("int8")
    assert quantizers.wished(int8, wish) == int8
    assert quantizers.wished(none.variant("bf16"), wish) == none.variant("bf16")


def test_a_type_that_is_not_proposed_can_be_asked_for_by_name() -> None:
    asked = Workload(methods=("bitsandbytes",), types=("FP4",))
    assert [v.type for v in wishes.variants("bitsandbytes", model(), asked)] == ["fp4"]
    assert wishes.variants("bitsandbytes", model(), Workload(types=("fp4",))) == ()
    assert [v.type for v in wishes.variants("none", model(), Workload(methods=("none",), types=("f32",)))] == ["f32"]
    sizes = wishes.variants("gptq", model(), Workload(quantizing=Quantizing(group_size=64)))
    assert {v.group_size for v in sizes} == {64} and len({v.type for v in sizes}) == len(sizes)


VARIANTS = [
    quantizers.wished(gptq.variant("4bit", size), Quantizing(symmetric=sym, act_order=order, quantizer=who))
    for size in (32, 128, -1)
    for sym in (True, False)
    for order in (True, False)
    for who in ("gptqmodel", "llm-compressor")
    if not (order and who == "llm-compressor")
] + [
    awq.variant("4bit"),
    quantizers.wished(awq.variant("4bit"), Quantizing(quantizer="autoawq")),
    quantizers.wished(awq.variant("4bit"), Quantizing(layout="gemv")),
    quantizers.wished(awq.variant("4bit"), Quantizing(symmetric=True)),
    bitsandbytes.variant("nf4"),
    quantizers.wished(bitsandbytes.variant("nf4"), Quantizing(double_quantization=False)),
]


def test_two_artifacts_that_differ_have_two_names() -> None:
    names = {serving.artifact_name(model(), variant) for variant in VARIANTS}
    assert len(names) == len(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS[:-2], ids=lambda v: serving.artifact_name(model(), v))
def test_the_printed_script_is_python_with_the_same_settings(variant: Variant) -> None:
    script = scripts.quantize(model(), variant)
    compile(script, "script", "exec")
    assert serving.artifact_name(model(), variant) in script
    assert quantizers.quantizer(quantizers.settings(variant).quantizer).version in script


WRITTEN = [
    (gptq.variant("4bit", act_order=False), Quantizing(), 4629624),
    (gptq.variant("3bit", act_order=False), Quantizing(), 4035192),
    (gptq.variant("4bit"), Quantizing(symmetric=False, act_order=True, group_size=32), 4906120),
    (gptq.variant("4bit", act_order=False), Quantizing(quantizer="llm-compressor"), 4552600),
    (awq.variant("4bit"), Quantizing(), 4570112),
    (awq.variant("4bit"), Quantizing(quantizer="autoawq"), 4570000),
    (awq.variant("4bit"), Quantizing(layout="gemv", group_size=64), 5092336),
    (awq.variant("4bit"), Quantizing(quantizer="llm-compressor"), 4575808),
    (bitsandbytes.variant("nf4"), Quantizing(), 4620919),
    (bitsandbytes.variant("fp4"), Quantizing(double_quantization=False), 4784656),
    (bitsandbytes.variant("int8"), Quantizing(), 6898338),
    (none.variant("fp8"), Quantizing(), 6864048),
    (none.variant("f16"), Quantizing(), 11547072),
]
"""Bytes of the weights that the quantizers of the table wrote of the demo model, 2026-11-26."""


@pytest.mark.parametrize(("variant", "wish", "file_bytes"), WRITTEN)
def test_sizes_are_those_that_were_written(variant: Variant, wish: Quantizing, file_bytes: int) -> None:
    made = quantizers.wished(variant, wish)
    size = methods.get(made.method).size(models.resolve("demo"), made)
    assert size.file_bytes == pytest.approx(file_bytes, rel=0.001)


# ---- no quantization


def checkpoint(folder: Path, arrays: list[dict[str, np.ndarray]], dtype: str = "F32") -> Path:
    """A checkpoint of several files; ``BF16`` is given as its bits."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {}
    for number, tensors in enumerate(arrays, 1):
        file = f"model-{number:05}-of-{len(arrays):05}.safetensors"
        entries, offset, blob = {}, 0, b""
        for name, values in tensors.items():
            stored = {"int64": "I64", "float16": "F16", "uint16": "BF16"}.get(values.dtype.name, dtype)
            entries[name] = {
                "dtype": stored,
                "shape": list(values.shape),
                "data_offsets": [offset, offset + values.nbytes],
            }
            offset, blob, names[name] = offset + values.nbytes, blob + values.tobytes(), file
        text = json.dumps(entries).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + blob)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "float32"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    return folder


def three_files(tmp_path: Path) -> Path:
    draw = np.random.default_rng(3)
    files = [{f"w{i}": draw.normal(size=(33, 17)).astype(np.float32)} for i in range(3)]
    files[1]["positions"] = np.arange(5, dtype=np.int64)
    return checkpoint(tmp_path / "source", files)


def job(source: Path, output: Path, type_: str) -> Job:
    step = Step(name="quantize", kind="quantize", method="none", type=type_, output=output.name)
    return Job(step=step, source=str(source), output=str(output))


def values(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for name, tensor in open_checkpoint(folder).tensors.items():
        kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}[tensor.dtype]
        found[name] = np.frombuffer(read_tensor_bytes(tensor), kind).reshape(tensor.shape)
    return found


def test_files_keep_their_names_and_whole_numbers_their_type(tmp_path: Path) -> None:
    source, output = three_files(tmp_path), tmp_path / "out"
    none_run.work(job(source, output, "f16"), lambda *_: None)
    before, after = values(source), values(output)
    assert before.keys() == after.keys() and after["positions"].dtype == np.int64
    assert all(np.array_equal(after[n], before[n].astype(np.float16)) for n in before if n != "positions")
    assert json.loads((output / "config.json").read_text()) == {"model_type": "llama", "torch_dtype": "float16"}
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in after.values())
    assert (output / "tokenizer.json").exists() and not (output / "modeling_own.py").exists()
    assert artifacts.size_bytes(output) == sum(path.stat().st_size for path in output.glob("*.safetensors"))


@settings(deadline=None, max_examples=25)  # each writes and syncs three folders
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=64))
def test_bf16_is_the_nearest_and_back_is_exact(numbers: list[float]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        source = checkpoint(Path(folder, "source"), [{"w": np.array(numbers, np.float32)}])
        half, back, again = (Path(folder, name) for name in ("half", "back", "again"))
        none_run.work(job(source, half, "bf16"), lambda *_: None)
        none_run.work(job(half, back, "f32"), lambda *_: None)
        none_run.work(job(back, again, "bf16"), lambda *_: None)
        exact, wide = np.array(numbers, np.float32), values(back)["w"]
        finite = np.isfinite(wide)
        assert np.all(np.abs(wide - exact)[finite] <= np.abs(exact[finite]) * 2.0**-8 + 2.0**-126)
        assert np.array_equal(values(half)["w"], values(again)["w"])


def test_a_value_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", [{"a": np.ones(4, np.float32)}, {"b": np.full(4, 1e6, np.float32)}])
    output = tmp_path / "out"
    with pytest.raises(InputError) as caught:
        none_run.work(job(source, output, "f16"), lambda *_: None)
    assert caught.value.code == "f16-overflow"
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_what_is_quantized_is_refused(tmp_path: Path) -> None:
    source = three_files(tmp_path)
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {}}))
    with pytest.raises(InputError) as caught:
        none_run.work(job(source, tmp_path / "out", "f16"), lambda *_: None)
    assert caught.value.code == "already-quantized"


class Killed(BaseException):
    """What no handler of ours catches."""


@pytest.mark.parametrize("after_bytes", [1, 3000, 6000])
def test_an_interrupted_conversion_goes_on(tmp_path: Path, after_bytes: int) -> None:
    source, output, whole = three_files(tmp_path), tmp_path / "out", tmp_path / "whole"
    none_run.work(job(source, whole, "bf16"), lambda *_: None)

    def stop(done: float, total: float) -> None:
        if done > after_bytes:
            raise Killed

    with pytest.raises(Killed):
        none_run.work(job(source, output, "bf16"), stop)
    assert not output.exists()
    assert partial_path(output).exists() == (after_bytes > 2244)  # the first file is on the disk
    made = none_run.work(job(source, output, "bf16"), lambda *_: None)
    assert made["resumed"] == (after_bytes > 2244)
    assert artifacts.sha256(output) == artifacts.sha256(whole)
    assert not partial_path(output).exists() and not journal_path(output).exists()


def test_another_type_does_not_go_on_from_what_is_there(tmp_path: Path) -> None:
    source, output = three_files(tmp_path), tmp_path / "out"

    def stop(done: float, total: float) -> None:
        if done > 3000:
            raise Killed

    with pytest.raises(Killed):
        none_run.work(job(source, output, "bf16"), stop)
    assert not none_run.work(job(source, output, "f16"), lambda *_: None)["resumed"]
    assert all(tensor.dtype != "BF16" for tensor in open_checkpoint(output).tensors.values())


def test_the_hash_of_a_folder_is_that_of_names_and_contents(tmp_path: Path) -> None:
    source = three_files(tmp_path)
    before = artifacts.sha256(source)
    (source / "tokenizer.json").rename(source / "tokenizer2.json")
    renamed = artifacts.sha256(source)
    (source / "tokenizer2.json").write_text("{ }")
    assert len({before, renamed, artifacts.sha256(source)}) == 3


def test_settings_survive_in_a_step() -> None:
    variant = dataclasses.replace(gptq.variant("4bit"), symmetric=False)
    made = gptq.steps(model(), variant)[0].settings
    assert made is not None and (made.symmetric, made.quantizer) == (False, "gptqmodel")


def test_a_checkpoint_that_a_library_refuses_is_not_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    """transformers raises ``OSError`` for files that it misses, as a full disk does."""
    torch = pytest.importorskip("torch")
    with (
        pytest.raises(InputError) as caught,
        directory_run.atomic_directory(tmp_path / "made"),
        torch_run.loading(tmp_path / "model"),
    ):
        raise OSError("no file named model.safetensors\nand more")
    assert caught.value.code == "model-refused" and "index" in caught.value.hint
    assert caught.value.numbers == "no file named model.safetensors"
    assert not list(tmp_path.iterdir())
    with pytest.raises(torch.OutOfMemoryError), torch_run.loading(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")
