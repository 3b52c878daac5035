import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.core.errors import InputError, ModelNotFound, QplanError, UnsupportedArchitecture
from planner.core.model import shape_sha256
from planner.formats.gguf import parse_header
from planner.models import catalog, catalog_entries, resolve
from planner.models.family import guess_family
from planner.models.fingerprint import pin, sha256_of
from planner.models.gguf_file import file_type_of, made_with_imatrix, spec_from_gguf, spec_from_header
from tests.formats_builders import LLAMA_CONFIG, gguf_bytes, gguf_llama, write_checkpoint, write_gguf, write_safetensors

PARAMETERS = 1_692_928  # of formats_builders.LLAMA_CONFIG, added up by hand


def error_of(text: object, **options: Any) -> QplanError:
    with pytest.raises(QplanError) as caught:
        resolve(str(text), **options)
    return caught.value


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_directory(tmp_path: Path, shards: int) -> None:
    folder = write_checkpoint(tmp_path / "my-llama", shards=shards)
    spec = resolve(str(folder))
    assert (spec.name, spec.architecture, spec.dtype, spec.tokenizer) == ("my-llama", "llama", "bf16", "bpe")
    assert spec.parameter_count == PARAMETERS and spec.notes == ()
    assert (spec.n_layer, spec.n_head, spec.n_head_kv, spec.n_vocab) == (2, 4, 2, 1000)
    assert spec.source.kind == "directory" and spec.source.location == str(folder)
    assert {file.name: file.size_bytes for file in spec.source.files} == {
        path.name: path.stat().st_size for path in folder.iterdir()
    }


def test_a_gguf_file(tmp_path: Path) -> None:
    spec = resolve(str(write_gguf(tmp_path / "small.gguf")))
    assert (spec.name, spec.architecture, spec.dtype, spec.tokenizer) == ("Small Llama", "llama", "f16", "spm")
    assert (spec.n_layer, spec.n_embd, spec.n_vocab, spec.n_ctx_train, spec.n_ff) == (2, 256, 320, 4096, 512)
    layer = spec.attention[1]
    assert (layer.kind, layer.head_count_kv, layer.k_dim, layer.v_dim) == ("full", 2, 64, 64)
    assert spec.tensors[1].dtype == "F32" and spec.tensors[2].dtype == "F16"


def test_a_quantized_gguf_file_says_so(tmp_path: Path) -> None:
    spec = resolve(str(write_gguf(tmp_path / "small.gguf", kind="Q4_K")))
    assert spec.dtype == "Q4_K" and "4.5" in spec.notes[0]


def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    blob = tmp_path / "sha256-abc"
    write_gguf(tmp_path / "m.gguf").rename(blob)
    assert resolve(str(blob)).source.kind == "gguf"


def test_catalog_names_aliases_and_sizes() -> None:
    assert resolve("llama-2-7b") == resolve(" meta-llama/Llama-2-7b-hf ")
    assert resolve("llama-2-7b").source.kind == "catalog"
    assert resolve("14b").source.kind == "size"


def test_a_path_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "llama-2-7b")
    monkeypatch.chdir(tmp_path)
    assert resolve("llama-2-7b").parameter_count == PARAMETERS


def test_the_demo_model_ships() -> None:
    spec = resolve("demo")
    assert spec.name == "demo" and spec.source.kind == "directory"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("lama-2-7b", "unknown-model"),
        ("", "unknown-model"),
        ("a\nb", "unknown-model"),
        ("a\0b", "unknown-model"),
        ("\ud800", "unknown-model"),
        ("x" * 100_000, "unknown-model"),
        ("a/b/c/d", "unknown-model"),
        ("💥", "unknown-model"),
        ("~nobody-of-this-name/m", "unknown-model"),
        ("$(rm -rf /)", "unknown-model"),
        ("./nothing", "missing-file"),
        ("/no/such/model.gguf", "missing-file"),
        ("nothing.gguf", "missing-file"),
        ("/dev/null", "unreadable-file"),
    ],
)
def test_names_that_lead_nowhere(text: str, code: str) -> None:
    error = error_of(text, offline=True)
    assert error.code == code
    str(error).encode()


def test_a_folder_whose_name_cannot_be_printed_is_told_the_character_and_the_way_round(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "two\nlines")
    with pytest.raises(ModelNotFound) as caught:
        resolve(str(folder))
    assert "U+000A" in caught.value.numbers and "link" in caught.value.hint
    (tmp_path / "link").symlink_to(folder)
    assert resolve(str(tmp_path / "link")).parameter_count > 0


def test_the_nearest_names_are_in_the_hint() -> None:
    error = error_of("lama2-7b")
    assert isinstance(error, ModelNotFound) and "llama-2-7b" in error.hint


@pytest.mark.parametrize(
    ("name", "code"),
    [("model.safetensors", "not-a-model"), ("pytorch_model.bin", "pickled-weights"), ("notes.txt", "not-a-model")],
)
def test_files_that_are_no_model(tmp_path: Path, name: str, code: str) -> None:
    folder = write_checkpoint(tmp_path / "m")
    if not (folder / name).exists():
        (folder / name).write_bytes(b"\x80\x02.")
    error = error_of(folder / name)
    assert error.code == code
    assert code != "not-a-model" or str(folder) in error.hint


def test_a_directory_without_a_config_says_what_to_give(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    error = error_of(tmp_path)
    assert error.code == "missing-config" and "m.gguf" in error.hint


def test_an_adapter_has_to_be_merged(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    write_safetensors(tmp_path / "adapter_model.safetensors", {"lora": ("F16", (4, 4))})
    error = error_of(tmp_path)
    assert error.code == "adapter-only" and "org/base" in error.numbers and "merge" in error.hint


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors"])
def test_quantized_checkpoints_are_refused(tmp_path: Path, method: str) -> None:
    folder = write_checkpoint(tmp_path / "m-AWQ", quantization_config={"quant_method": method, "bits": 4})
    error = error_of(folder)
    assert error.code == "already-quantized" and method in error.what and "'m'" in error.hint


def test_pickled_checkpoints_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert error_of(tmp_path).code == "pickled-weights"


def test_a_missing_key_of_the_config_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    for text, expected in (
        (json.dumps({**LLAMA_CONFIG, "hidden_size": None}), "hidden_size"),
        (json.dumps({**LLAMA_CONFIG, "vocab_size": "many"}), "vocab_size"),
        (json.dumps({**LLAMA_CONFIG, "num_hidden_layers": 10**9}), "num_hidden_layers"),
        ("[1]", "config.json"),
        ("{", "config.json"),
        ("[" * 100_000, "config.json"),
    ):
        (folder / "config.json").write_text(text)
        error = error_of(folder)
        assert error.code == "bad-config" and expected in error.what


def test_an_unknown_architecture_points_to_gguf(tmp_path: Path) -> None:
    error = error_of(write_checkpoint(tmp_path / "m", model_type="wonder"))
    assert isinstance(error, UnsupportedArchitecture) and "wonder" in error.what and "GGUF" in error.hint


def test_other_counts_than_the_config_says_are_noted(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", extra={"model.layers.9.odd.weight": ("BF16", (10, 10))})
    (note,) = resolve(str(folder)).notes
    assert "1,693,028" in note and "1,692,928" in note and "+100" in note


def test_a_vision_tower_is_left_out_with_a_note(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", extra={"vision_tower.patch.weight": ("F32", (1000, 1000))})
    spec = resolve(str(folder))
    assert spec.parameter_count == PARAMETERS and spec.dtype == "bf16"
    assert len(spec.notes) == 1 and "1,000,000" in spec.notes[0]


def test_tied_embeddings_follow_the_weights(tmp_path: Path) -> None:
    assert resolve(str(write_checkpoint(tmp_path / "m", tie_word_embeddings=True))).tied_embeddings


def test_the_tokenizer_kind_comes_from_its_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m")
    for text, kind in (
        ('{"model": {"type": "BPE", "byte_fallback": true}}', "spm"),
        ('{"model":{\n "type": "BPE", "byte_fallback": false}}', "bpe"),
        ('{"model": {"type": "WordPiece"}}', "wpm"),
        ("nonsense", "bpe"),
    ):
        (folder / "tokenizer.json").write_text(text)
        assert resolve(str(folder)).tokenizer == kind


def test_a_snapshot_in_the_hubs_cache_keeps_its_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "models--org--small-llama" / "snapshots" / "0123abc")
    assert resolve(str(folder)).name == "org/small-llama"


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("Meta Llama 3.1 8B Instruct", "llama-3.1"),
        ("llama-2-7b.Q4_K_M.gguf", "llama-2"),
        ("codellama-7b", "codellama"),
        ("llama-7b", "llama-1"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5"),
        ("gemma-2b", "gemma"),
        ("gemma-2-2b-it", "gemma-2"),
        ("my-model", None),
    ],
)
def test_families(name: str, family: str | None) -> None:
    assert guess_family((name,), "another", 1) == family


def test_pins_are_hashes_of_the_files(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", shards=2)
    spec = resolve(str(folder))
    assert {file.name: file.sha256 for file in pin(spec)} == {path.name: sha256_of(path) for path in folder.iterdir()}
    without = {file.name: file.sha256 for file in pin(spec, weights=False)}
    assert without["config.json"] and without["model-00001-of-00002.safetensors"] is None
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="changed"):
        pin(spec)
    assert pin(resolve("llama-2-7b")) == ()


def test_gguf_pins_cover_the_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    (file,) = pin(resolve(str(path)))
    assert (file.name, file.sha256) == ("m.gguf", sha256_of(path))


def test_the_shape_hash_sees_shapes_only(tmp_path: Path) -> None:
    one, same = write_checkpoint(tmp_path / "a"), write_checkpoint(tmp_path / "b", shards=3)
    wider = write_checkpoint(tmp_path / "c", vocab_size=1001)
    hashes = [shape_sha256(resolve(str(folder))) for folder in (one, same, wider)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_gguf_shapes_agree_with_config_shapes_for_the_whole_catalog(tmp_path: Path) -> None:
    """Two readings of one model, from metadata and from config.json, by separate rules."""
    from planner.execute.stub import write_stub

    for name in catalog.names():
        expected = catalog.lookup(name)
        assert expected is not None
        path = tmp_path / "stub.gguf"
        path.unlink(missing_ok=True)
        write_stub(expected, path)
        found = spec_from_gguf(path)
        assert found.attention == expected.attention, name
        assert found.mixture == expected.mixture, name
        for field in (
            "architecture",
            "n_layer",
            "n_embd",
            "n_vocab",
            "n_ctx_train",
            "n_ff",
            "mla",
            "n_head",
            "n_head_kv",
        ):
            assert getattr(found, field) == getattr(expected, field), (name, field)
        assert found.active_parameter_count == expected.active_parameter_count


def gguf_error(tmp_path: Path, content: bytes) -> InputError:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    error = error_of(path)
    assert isinstance(error, InputError)
    return error


def test_gguf_files_that_hold_no_language_model(tmp_path: Path) -> None:
    metadata, tensors = gguf_llama()
    for change, code in (
        ({"general.type": ("str", "adapter")}, "not-a-model"),
        ({"general.architecture": ("str", "clip")}, "not-a-model"),
        ({"general.architecture": ("u32", 7)}, "bad-gguf-metadata"),
        ({"llama.block_count": ("u32", 0)}, "bad-gguf-metadata"),
        ({"llama.block_count": ("u32", 2**31)}, "bad-gguf-metadata"),
        ({"llama.block_count": ("u32", 1)}, "bad-gguf-metadata"),
        ({"llama.attention.head_count_kv": ("arr", ("i32", [2]))}, "bad-gguf-metadata"),
        ({"llama.attention.head_count": ("arr", ("i32", [-4, -4]))}, "bad-gguf-metadata"),
        ({"llama.embedding_length": ("str", "wide")}, "bad-gguf-metadata"),
        ({"llama.expert_count": ("u32", 8)}, "bad-gguf-metadata"),
    ):
        assert gguf_error(tmp_path, gguf_bytes(metadata | change, tensors)).code == code
    assert gguf_error(tmp_path, gguf_bytes(metadata, {})).code == "no-weights"
    renamed = {name.replace("blk.1.", "blk.x."): value for name, value in tensors.items()}
    assert gguf_error(tmp_path, gguf_bytes(metadata, renamed)).code == "bad-gguf-metadata"


def test_heads_per_layer_and_layers_without_attention() -> None:
    metadata, tensors = gguf_llama(attention__head_count_kv=("arr", ("i32", [2, 0])))
    content = gguf_bytes(metadata, tensors)
    spec = spec_from_header(parse_header(content, len(content)), resolve("llama-2-7b").source)
    assert [(layer.kind, layer.head_count_kv) for layer in spec.attention] == [("full", 2), ("none", 0)]


VALUES = st.one_of(
    st.tuples(st.just("u32"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("i32"), st.integers(-(2**31), 2**31 - 1)),
    st.tuples(st.just("f32"), st.sampled_from([0.0, -1.5, float("nan"), float("inf")])),
    st.tuples(st.just("str"), st.text(max_size=5)),
    st.tuples(st.just("bool"), st.booleans()),
    st.tuples(st.just("arr"), st.tuples(st.just("i32"), st.lists(st.integers(-2, 9), max_size=3))),
)
KEYS = st.sampled_from(
    [
        "general.name",
        "general.type",
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.attention.key_length",
        "llama.attention.value_length_mla",
        "llama.attention.key_length_mla",
        "llama.expert_count",
        "llama.expert_used_count",
        "llama.nextn_predict_layers",
        "llama.ssm.state_size",
        "llama.ssm.conv_kernel",
        "llama.ssm.inner_size",
        "llama.shortconv.l_cache",
        "llama.wkv.head_size",
        "llama.attention.shared_kv_layers",
        "tokenizer.ggml.model",
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=3), st.sampled_from(["llama", "gemma3", "gpt-oss", "qwen3next", "rwkv7"]))
def test_any_metadata_resolves_or_is_refused(changes: dict[str, Any], architecture: str) -> None:
    metadata, tensors = gguf_llama(vocab=32)
    metadata = {key.replace("llama.", f"{architecture}."): value for key, value in (metadata | changes).items()}
    metadata["general.architecture"] = ("str", architecture)
    content = gguf_bytes(metadata, tensors)
    try:
        spec = spec_from_header(parse_header(content, len(content)), resolve("llama-2-7b").source)
    except QplanError as error:
        str(error).encode()
    else:
        assert len(spec.attention) == spec.n_layer
        assert all(layer.k_dim >= 0 and layer.state_bytes >= 0 for layer in spec.attention)


def test_resolving_a_name_imports_nothing_heavy() -> None:
    code = (
        "import sys; from planner.models import resolve; resolve('llama-2-7b'); resolve('demo');"
        "heavy = {'numpy', 'torch', 'gguf', 'huggingface_hub', 'pydantic', 'transformers', 'safetensors', 'llama_cpp'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=os.environ)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_a_checkpoint_that_transformers_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = transformers.LlamaConfig(**{key: value for key, value in LLAMA_CONFIG.items() if key != "architectures"})
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    spec = resolve(str(tmp_path / "saved"))
    assert spec.parameter_count == model.num_parameters() == PARAMETERS
    assert spec.dtype == "bf16" and spec.notes == ()
    assert sum(file.name.endswith(".safetensors") for file in spec.source.files) > 1


def test_file_types_come_from_the_file_or_its_bytes(tmp_path: Path) -> None:
    metadata, tensors = gguf_llama(kind="Q4_K")
    path = tmp_path / "m.gguf"
    for change, expected in (
        ({"general.file_type": ("u32", 14)}, "Q4_K_S"),
        ({"general.file_type": ("u32", 1024 + 14)}, "Q4_K_M"),
        ({"general.file_type": ("u32", 999)}, "Q4_K_M"),
        ({}, "Q4_K_M"),
    ):
        path.write_bytes(gguf_bytes(metadata | change, tensors))
        assert file_type_of(path) == expected
    assert not made_with_imatrix(path)
    path.write_bytes(gguf_bytes(metadata | {"quantize.imatrix.file": ("str", "i.gguf")}, tensors))
    assert made_with_imatrix(path)


def test_the_catalog_is_listed_without_its_tensors() -> None:
    entries = catalog_entries()
    assert [entry.name for entry in entries] == list(catalog.names())
    assert all(entry.parameter_count > 10**7 for entry in entries)
