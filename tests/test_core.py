"""Units, errors, documents."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.core import data
from planner.core.codec import canonical_json, content_sha256, decode, encode, read_json, write_atomically
from planner.core.errors import InputError, QplanError, UsageError, first_line
from planner.core.hardware import Cpu, Gpu, HardwareProfile, Memory
from planner.core.units import format_bytes, format_rate, format_seconds, pad, parse_bytes


@pytest.mark.parametrize(
    ("text", "value"),
    [("10GiB", 10 << 30), ("10G", 10 << 30), ("24GB", 24_000_000_000), ("512 MiB", 512 << 20), ("1.5g", 3 << 29)],
)
def test_sizes_are_read_in_their_own_unit(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "ten", "-1G", "1 XB", "1e9", "1..2G"])
def test_a_size_that_is_none_is_refused_with_a_hint(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert "10GiB" in caught.value.hint


@given(st.integers(0, 1 << 50), st.integers(1, 1 << 20))
def test_padding_is_the_least_multiple_not_below(value: int, multiple: int) -> None:
    padded = pad(value, multiple)
    assert padded % multiple == 0 and value <= padded < value + multiple


def test_numbers_for_a_person() -> None:
    assert format_bytes(7_865_960_416) == "7.3 GiB"
    assert format_bytes(None) == "unknown"
    assert format_rate(1234.5) == "1,234" and format_rate(9.876) == "9.88"
    assert format_seconds(3900) == "1 h 5 min"


def machine() -> HardwareProfile:
    gpu = Gpu(name="NVIDIA GeForce RTX 4090", vendor="nvidia", backend="cuda", memory_total_bytes=24 << 30)
    return HardwareProfile(
        name="a machine",
        os="linux",
        cpu=Cpu(model="a CPU", architecture="x86_64", physical_core_count=8, simd=("avx2", "f16c")),
        memory=Memory(total_bytes=64 << 30, available_bytes=50 << 30),
        gpus=(gpu,),
    )


def test_a_value_survives_json() -> None:
    before = machine()
    assert decode(HardwareProfile, json.loads(canonical_json(before)), what="it") == before


def test_a_document_with_an_unknown_key_is_refused_with_its_path() -> None:
    document = encode(machine())
    document["gpus"][0]["vram"] = 3
    with pytest.raises(InputError) as caught:
        decode(HardwareProfile, document, what="it")
    assert "gpus.0.vram" in caught.value.numbers


def test_the_identity_ignores_what_changes_between_runs() -> None:
    one = machine()
    busy = dataclasses.replace(one, memory=Memory(total_bytes=64 << 30, available_bytes=1 << 30), notes=("a note",))
    other = dataclasses.replace(one, gpus=())
    assert one.identity() == busy.identity() != other.identity()


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.lists(st.integers())))
def test_the_hash_of_a_document_does_not_depend_on_the_order_of_its_keys(content: dict[str, object]) -> None:
    assert content_sha256(content) == content_sha256(dict(reversed(list(content.items()))))


def test_writing_replaces_a_file_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "made" / "file.json"
    write_atomically(path, "{}")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "{}"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_an_error_not_a_traceback(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_json(path)


def test_an_error_prints_its_four_parts() -> None:
    error = QplanError("it does not fit", numbers="needs 2\nhas 1", hint="buy another", code="does-not-fit")
    assert str(error) == "it does not fit [does-not-fit]\n  needs 2\n  has 1\nhint: buy another"


def test_rows_of_a_document_are_values_that_can_be_hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Row:
        name: str
        sizes: tuple[int, ...] = ()
        arguments: tuple[tuple[str, str], ...] = ()

    table = tmp_path / "rows.toml"
    table.write_text('[[row]]\nname = "b"\nsizes = [32, 64]\narguments = { dtype = "auto" }\n[[row]]\nname = "a"\n')
    monkeypatch.setattr(data, "data_path", lambda _: table)
    rows = data.read_rows(Row, "rows of a test", "row")
    assert rows == (Row("b", (32, 64), (("dtype", "auto"),)), Row("a")) and len({*rows}) == 2
    assert data.named(rows, "a", what="row", code="unknown-row") is rows[1]
    with pytest.raises(UsageError, match="'c' is no row") as error:
        data.named(rows, "c", what="row", code="unknown-row")
    assert error.value.hint == "one of b, a" and error.value.code == "unknown-row"


@pytest.mark.parametrize(("said", "told"), [("one\ntwo", "one"), ("\n  late \n", "late"), ("", "ValueError")])
def test_the_first_line_of_an_error(said: str, told: str) -> None:
    assert first_line(ValueError(said)) == told
