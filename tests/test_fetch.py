"""Downloads from a stand-in hub: progress, stopping at any moment, going on, broken lines, damaged files."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")

from planner.core.errors import InputError, Interrupted
from planner.core.plan import PinnedFile, PlanModel
from planner.execute import fetch, obtain
from planner.execute.process import stoppable
from tests.formats_builders import write_checkpoint
from tests.hub_server import COMMIT, FakeHub, sha256

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub(folders={"org/model": write_checkpoint(tmp_path / "model", shards=2, vocab_size=8000)})
    server = fake.start()
    for name, value in {"HF_ENDPOINT": fake.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    yield fake
    server.shutdown()


def pinned(hub: FakeHub, **other_hashes: str) -> PlanModel:
    """The stand-in's model as a plan pins it."""
    files = []
    for path in sorted(hub.folders["org/model"].iterdir()):
        hashed = sha256(path) if path.suffix == ".safetensors" else None
        files.append(PinnedFile(name=path.name, size_bytes=path.stat().st_size, sha256=hashed))
    return PlanModel(
        name="org/model", architecture="llama", kind="hub", location="org/model", revision=COMMIT,
        parameter_count=1, shape_sha256="0", files=tuple(files),
    )  # fmt: skip


class Fetching:
    """A download in this test, with what it told."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "download.log"
        self.told: list[tuple[int, int]] = []
        self.stop = threading.Event()
        self.stop_at: float = 2.0
        """Share of the whole at which a person stops it."""

    def __call__(self, model: PlanModel) -> Path:
        with stoppable(self.stop):
            return obtain.download(model, log=self.log, progress=self._tell)

    def _tell(self, done: int, total: int) -> None:
        self.told.append((done, total))
        if done >= self.stop_at * total:
            self.stop.set()


def blobs(folder: Path) -> list[Path]:
    return sorted((folder / "hf" / "hub" / "models--org--model" / "blobs").iterdir())


def same(found: Path, hub: FakeHub) -> bool:
    ours = hub.folders["org/model"]
    return all((found / path.name).read_bytes() == path.read_bytes() for path in ours.iterdir())


def test_what_comes_is_told_and_a_second_time_nothing_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    model, fetching = pinned(hub), Fetching(tmp_path)
    hub.piece_seconds = 0.01
    found = fetching(model)
    whole = sum(file.size_bytes for file in model.files)
    assert same(found, hub) and found.name == COMMIT
    assert [done for done, _ in fetching.told] == sorted(done for done, _ in fetching.told)
    assert {total for _, total in fetching.told} == {whole} and fetching.told[-1][0] == whole
    assert len({done for done, _ in fetching.told}) > 3
    hub.sent_bytes.clear()
    again = Fetching(tmp_path)
    assert again(model) == found and not hub.sent_bytes and again.told[-1] == (whole, whole)


def test_stopped_it_leaves_nothing_half_under_a_final_name_and_goes_on_from_there(hub: FakeHub, tmp_path: Path) -> None:
    model, fetching = pinned(hub), Fetching(tmp_path)
    hub.piece_seconds, fetching.stop_at = 0.02, 0.3
    began = time.monotonic()
    with pytest.raises(Interrupted):
        fetching(model)
    assert time.monotonic() - began < 60
    left = [path for path in blobs(tmp_path) if path.name.endswith(".incomplete")]
    weights = {file.sha256: file.size_bytes for file in model.files if file.sha256}
    kept = sum(path.stat().st_size for path in blobs(tmp_path) if path.name.partition(".")[0] in weights)
    assert left and 0 < kept < sum(weights.values())
    assert all(path.stat().st_size == weights[path.name] for path in blobs(tmp_path) if path.name in weights)
    assert all(not path.is_symlink() or path.exists() for path in tmp_path.rglob("*.safetensors"))
    time.sleep(0.5)  # the server sees that nobody listens
    hub.sent_bytes.clear()
    hub.piece_seconds = 0.0
    again = Fetching(tmp_path)
    assert same(again(model), hub)
    assert sum(n for name, n in hub.sent_bytes.items() if name.endswith("s")) == sum(weights.values()) - kept
    assert again.told[0][0] >= kept
    assert not any(path.name.endswith(".incomplete") for path in blobs(tmp_path))


def test_a_server_without_ranges_begins_anew_and_the_file_is_right(hub: FakeHub, tmp_path: Path) -> None:
    model, fetching = pinned(hub), Fetching(tmp_path)
    hub.piece_seconds, fetching.stop_at = 0.02, 0.3
    with pytest.raises(Interrupted):
        fetching(model)
    hub.ignores_ranges, hub.piece_seconds = {"org/model"}, 0.0
    assert same(Fetching(tmp_path)(model), hub)


def test_a_line_that_breaks_is_taken_up_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.breaks_after = 3 << 20
    assert max(file.size_bytes for file in pinned(hub).files) > hub.breaks_after
    assert same(Fetching(tmp_path)(pinned(hub)), hub)


def test_what_arrives_with_another_hash_is_thrown_away(hub: FakeHub, tmp_path: Path) -> None:
    model = pinned(hub)
    files = tuple(dataclasses.replace(f, sha256="f" * 64) if f.name == SHARD else f for f in model.files)
    with pytest.raises(InputError, match="arrived damaged") as caught:
        Fetching(tmp_path)(dataclasses.replace(model, files=files))
    assert caught.value.code == "download-failed" and "anew" in caught.value.hint
    assert not any(path.name.startswith("f" * 64) for path in blobs(tmp_path))


def test_what_the_hub_refuses_is_said_at_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.gated = {"org/model"}
    with pytest.raises(InputError) as caught:
        Fetching(tmp_path)(pinned(hub))
    assert caught.value.code == "gated-model" and "HF_TOKEN" in caught.value.hint


@pytest.mark.slow
def test_a_hub_that_is_gone_says_how_to_go_on(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pinned(hub)
    weights = tuple(file for file in model.files if file.sha256)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError) as caught:
        Fetching(tmp_path)(dataclasses.replace(model, files=weights))
    assert caught.value.code == "download-failed" and "goes on where it stopped" in caught.value.hint


def test_what_is_missing_is_known_before_anything_is_asked(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from planner.core.errors import NeedsConfirmation
    from planner.workflow.applying import confirm_download

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    model = pinned(hub)
    whole = sum(file.size_bytes for file in model.files)
    assert obtain.missing_bytes(model) == whole
    asked: list[str] = []

    def no(question: str) -> bool:
        asked.append(question)
        return False

    with pytest.raises(NeedsConfirmation):
        confirm_download(model, assume_yes=False, confirm=no)
    blob = fetch.cache_folder("org/model") / "blobs" / f"{sha256(hub.folders['org/model'] / SHARD)}.incomplete"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(bytes(1 << 20))
    assert obtain.missing_bytes(model) == whole - (1 << 20)
    blob.unlink()
    Fetching(tmp_path)(model)
    assert obtain.missing_bytes(model) == 0
    confirm_download(model, assume_yes=False, confirm=no)
    assert len(asked) == 1


def test_no_room_in_the_cache_is_said_before_anything_is_fetched(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from planner.core.errors import ExecutionFailed

    usage: Any = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ExecutionFailed, match="disk space") as caught:
        fetch._check_room(tmp_path / "not" / "there", 1 << 30)
    assert "1.0 GiB" in caught.value.numbers and "HF_HOME" in caught.value.hint
