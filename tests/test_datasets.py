"""Calibration text of a dataset on the hub, against a stand-in on 127.0.0.1."""

from __future__ import annotations

import gzip
import json
import os
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.core.errors import StalePlan, UsageError
from planner.execute import calibration, datasets
from tests.hub_server import COMMIT, FakeHub

pytest.importorskip("huggingface_hub")

CHAT = [{"role": "user", "content": "What is a KV cache?"}, {"role": "assistant", "content": "Keys and values, kept."}]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("about it")
    (folder / "loader.py").write_text("raise SystemExit('remote code was run')")
    return folder


@pytest.fixture
def hub(repository: Path, tmp_path: Path) -> Iterator[FakeHub]:
    found = FakeHub(folders={"org/texts": repository})
    server = found.start()
    yield found
    server.shutdown()


CHILD = """
import json, sys
from pathlib import Path
from planner.core.errors import QplanError
from planner.execute import calibration as c

for name in sys.argv[1:]:
    try:
        made = c.from_text(Path(name), 4, 7)
        found = {"location": made.location, "kind": made.kind, "text": c.text(made), "sha256": made.sha256}
        print(json.dumps({**found, "said": c.described(made)}))
    except QplanError as error:
        print(json.dumps({"error": error.code, "text": str(error)}))
"""


def read_all(hub: FakeHub, tmp_path: Path, *names: str, **environment: str) -> list[dict[str, str]]:
    """What pinning each text gives, in a process of its own, as the hub's address is read at import."""
    paths = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *names],
        env={**os.environ, **paths, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def read(hub: FakeHub, tmp_path: Path, name: str, **environment: str) -> dict[str, str]:
    """What pinning one text gives."""
    return read_all(hub, tmp_path, name, **environment)[0]


def lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_of_the_split_are_pinned_by_commit_and_read_again_offline(
    hub: FakeHub, repository: Path, tmp_path: Path
) -> None:
    lines(repository / "data/train-00000-of-00002.jsonl", [{"id": 1, "text": "first"}, {"id": 2, "text": " second\n"}])
    lines(repository / "data/train-00001-of-00002.jsonl", [{"id": 3, "text": "third"}, {"id": 4, "text": ""}])
    lines(repository / "data/test.jsonl", [{"id": 5, "text": "held out"}])
    made = read(hub, tmp_path, "hub:org/texts")
    assert made["text"] == "first\n\nsecond\n\nthird" and made["kind"] == "text"
    assert made["location"] == f"hub:org/texts@{COMMIT}"
    assert "org/texts" in str(made["said"]) and str(tmp_path) not in str(made["said"])
    assert "loader.py" not in hub.sent_bytes and "data/test.jsonl" not in hub.sent_bytes
    again = read(hub, tmp_path, str(made["location"]), HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert again["sha256"] == made["sha256"]


def test_split_and_column_choose_and_conversations_are_written_out(
    hub: FakeHub, repository: Path, tmp_path: Path
) -> None:
    lines(repository / "data/train.jsonl", [{"prompt": "a", "messages": CHAT}])
    lines(repository / "data/test.jsonl", [{"prompt": "of the test", "messages": CHAT}])
    assert read(hub, tmp_path, "hub:org/texts:test:prompt")["text"] == "of the test"
    assert read(hub, tmp_path, "hub:org/texts@v1")["text"] == (
        "user: What is a KV cache?\nassistant: Keys and values, kept."
    )


def test_compressed_lines_lists_and_plain_text_are_read(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    with gzip.open(repository / "train.jsonl.gz", "wt") as file:
        file.write(json.dumps({"content": "packed"}) + "\n")
    (repository / "validation.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    (repository / "test.txt").write_text("plain\nlines\n")
    assert read(hub, tmp_path, "hub:org/texts")["text"] == "packed"
    assert read(hub, tmp_path, "hub:org/texts:validation")["text"] == "one\n\ntwo"
    assert read(hub, tmp_path, "hub:org/texts:test")["text"] == "plain\n\nlines"


def test_parquet_is_read_by_column(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"label": [0, 1, 2], "text": ["erste", None, "dritte"]})
    pyarrow.parquet.write_table(table, repository / "data" / "train-00000-of-00001.parquet")
    assert read(hub, tmp_path, "hub:org/texts:train:text")["text"] == "erste\n\ndritte"
    assert read(hub, tmp_path, "hub:org/texts:train:label")["error"] == "bad-dataset"
    (repository / "data" / "test.parquet").write_bytes(b"PAR1 and no more")
    broken = read(hub, tmp_path, "hub:org/texts:test")
    assert broken["error"] == "bad-dataset" and "test.parquet" in str(broken["text"])


UNUSABLE = {
    "hub:org/none": ("no-dataset", "org/none"),
    "hub:org/texts@v9": ("unknown-revision", "v9"),
    "hub:org/texts:dev": ("bad-dataset", "data/train.jsonl"),
    "hub:org/texts:train:body": ("bad-dataset", "columns: title, words"),
    "hub:org/texts:train": ("bad-dataset", "columns: title, words"),
    "hub:org/texts:broken": ("bad-dataset", "broken.jsonl"),
    "hub:org/texts:empty": ("bad-dataset", "no text"),
    "hub:texts": ("bad-dataset", "hub:ORG/NAME"),
}


def test_what_cannot_be_used_is_said(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    lines(repository / "data/train.jsonl", [{"title": "a", "words": 3}])
    (repository / "data/broken.jsonl").write_text('{"text": "cut')
    (repository / "data/empty.jsonl").write_text("\n\n")
    for (name, (code, said)), found in zip(UNUSABLE.items(), read_all(hub, tmp_path, *UNUSABLE), strict=True):
        assert found["error"] == code and said in found["text"], name


def test_a_dataset_of_scripts_alone_is_not_run(hub: FakeHub, tmp_path: Path) -> None:
    found = read(hub, tmp_path, "hub:org/texts")
    assert found["error"] == "bad-dataset" and "script" in str(found["text"]) and not hub.sent_bytes


def test_a_long_dataset_is_cut_at_a_fixed_size(hub: FakeHub, repository: Path, tmp_path: Path) -> None:
    lines(repository / "train-0.jsonl", [{"text": "ä" * 100_000} for _ in range(60)])
    lines(repository / "train-1.jsonl", [{"text": "never fetched"}])
    text = str(read(hub, tmp_path, "hub:org/texts")["text"])
    assert datasets.TEXT_BYTES - 4 <= len(text.encode()) <= datasets.TEXT_BYTES and text.endswith("ä")
    assert "train-1.jsonl" not in hub.sent_bytes


def test_another_text_under_the_same_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    location = f"hub:org/texts@{COMMIT}"
    monkeypatch.setattr(datasets, "read", lambda _text: ("a text", location))
    made = calibration.from_text(Path("hub:org/texts"))
    monkeypatch.setattr(datasets, "read", lambda _text: ("another text", location))
    with pytest.raises(StalePlan):
        calibration.check(made)


WORD = st.text(string.ascii_lowercase, min_size=1, max_size=8)


@given(org=WORD, name=WORD, revision=WORD | st.none(), split=WORD | st.just(""), column=WORD | st.just(""))
def test_a_pinned_name_means_the_same(org: str, name: str, revision: str | None, split: str, column: str) -> None:
    text = f"hub:{org}/{name}" + (f"@{revision}" if revision else "") + f":{split}:{column}".rstrip(":")
    found = datasets.parsed(text)
    again = datasets.parsed(found.location(COMMIT))
    assert (again.repository, again.split, again.column) == (found.repository, found.split, found.column)
    assert again.revision == COMMIT and found.revision == revision


@given(st.text(max_size=30))
def test_no_name_fails_otherwise_than_told(text: str) -> None:
    try:
        datasets.parsed(f"hub:{text}")
    except UsageError as error:
        assert "hub:ORG/NAME" in error.hint
