"""Hub ids against a stand-in server; a child process each, as huggingface_hub reads its environment when imported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.formats_builders import write_checkpoint, write_gguf, write_safetensors
from tests.hub_server import COMMIT, FakeHub, sha256

pytest.importorskip("huggingface_hub")

CHILD = """
import json, sys
from dataclasses import asdict
from planner.core.errors import QplanError
from planner.models import resolve
for text in sys.argv[1:]:
    offline = text.startswith("offline ")
    try:
        spec = resolve(text.removeprefix("offline "), offline=offline)
        found = asdict(spec) | {"parameter_count": spec.parameter_count}
    except QplanError as error:
        found = {"code": error.code, "what": error.what, "numbers": error.numbers, "hint": error.hint}
    print(json.dumps(found))
"""
MIB = 1 << 20


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    base = tmp_path_factory.mktemp("hub")
    fake = FakeHub()
    fake.folders["org/small"] = write_checkpoint(base / "small", shards=3, vocab_size=40_000)
    fake.folders["org/one"] = write_checkpoint(base / "one")
    fake.folders["org/deaf"] = write_checkpoint(base / "deaf", vocab_size=40_000)
    fake.folders["org/gated"] = write_checkpoint(base / "gated")
    fake.folders["org/pickled"] = base / "pickled"
    fake.folders["org/lora"] = base / "lora"
    fake.folders["org/m-GGUF"] = base / "gguf"
    for name in ("pickled", "lora", "gguf"):
        (base / name).mkdir()
    (base / "pickled" / "config.json").write_text("{}")
    (base / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (base / "lora" / "adapter_config.json").write_text("{}")
    write_safetensors(base / "lora" / "adapter_model.safetensors", {"lora": ("F16", (4, 4))})
    write_gguf(base / "gguf" / "m.Q4_K_M.gguf", kind="Q4_K", vocab=60_000)
    write_gguf(base / "gguf" / "m.F16.gguf", vocab=32_000)
    fake.gated, fake.ignores_ranges = {"org/gated"}, {"org/deaf"}
    server = fake.start()
    yield fake
    server.shutdown()


@pytest.fixture
def ask(hub: FakeHub, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    def run(*texts: str, **environment: str) -> list[dict[str, Any]]:
        hub.sent_bytes.clear()
        hub.tokens.clear()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        paths = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *texts],
            env={**kept, **paths, **environment},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def test_shapes_come_from_header_ranges_alone(ask: Callable[..., list[dict[str, Any]]], hub: FakeHub) -> None:
    (spec,) = ask("org/small")
    folder = hub.folders["org/small"]
    assert spec["parameter_count"] == 21_660_928 and spec["dtype"] == "bf16" and spec["tokenizer"] == "bpe"
    assert spec["name"] == "org/small" and spec["notes"] == []
    source = spec["source"]
    assert (source["kind"], source["location"], source["revision"]) == ("hub", "org/small", COMMIT)
    weights = sorted(folder.glob("*.safetensors"))
    pinned = {file["name"]: file for file in source["files"]}
    for path in weights:
        assert pinned[path.name]["size_bytes"] == path.stat().st_size
        assert pinned[path.name]["sha256"] == sha256(path)
        header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert hub.sent_bytes[path.name] == header_bytes
    assert sum(path.stat().st_size for path in weights) > 40 * MIB
    assert sum(hub.sent_bytes.values()) < MIB // 10


def test_a_server_that_ignores_ranges_is_cut_off(ask: Callable[..., list[dict[str, Any]]], hub: FakeHub) -> None:
    (spec,) = ask("org/deaf")
    assert spec["parameter_count"] == 21_660_928
    assert hub.sent_bytes["model.safetensors"] < 20 * MIB  # two answers of 43 MB each, less what sockets buffer


def test_names_revisions_and_addresses(ask: Callable[..., list[dict[str, Any]]], hub: FakeHub) -> None:
    main, tag, commit, url, missing = ask(
        "org/one", "org/one@v1", f"org/one@{COMMIT}", "https://huggingface.co/org/one/", "org/one@v9"
    )
    assert main == tag == commit == url
    assert missing["code"] == "unknown-revision"


def test_gguf_files_are_chosen_by_name_or_type(ask: Callable[..., list[dict[str, Any]]], hub: FakeHub) -> None:
    unchosen, by_name, by_type, wrong = ask(
        "org/m-GGUF", "org/m-GGUF:m.F16.gguf", "org/m-GGUF:q4_k_m", "org/m-GGUF:Q5_K_M"
    )
    assert unchosen["code"] == wrong["code"] == "choose-gguf-file"
    assert "m.Q4_K_M.gguf" in unchosen["numbers"] and "org/m-GGUF:m.F16.gguf" in unchosen["hint"]
    assert by_name["dtype"] == "f16" and by_name["n_vocab"] == 32_000
    assert by_type["dtype"] == "Q4_K" and by_type["name"] == "org/m-GGUF:m.Q4_K_M.gguf"
    whole = (hub.folders["org/m-GGUF"] / "m.F16.gguf").stat().st_size
    assert 0 < hub.sent_bytes["m.F16.gguf"] < whole / 10


def test_repositories_that_cannot_be_used(ask: Callable[..., list[dict[str, Any]]]) -> None:
    pickled, lora, nobody, gated = ask("org/pickled", "org/lora", "org/llama-2-7b-ht", "org/gated")
    assert pickled["code"] == "pickled-weights" and lora["code"] == "adapter-only"
    assert nobody["code"] == "unknown-model" and "llama-2-7b" in nobody["hint"]
    assert gated["code"] == "gated-model" and "HF_TOKEN" in gated["hint"]


def test_a_token_opens_gated_models(ask: Callable[..., list[dict[str, Any]]], hub: FakeHub) -> None:
    (spec,) = ask("org/gated", HF_TOKEN="hf_secret")
    assert spec["parameter_count"] == 1_692_928
    assert hub.tokens == {"Bearer hf_secret"}


def test_offline_uses_the_cache_and_says_what_is_missing(
    ask: Callable[..., list[dict[str, Any]]], hub: FakeHub
) -> None:
    online, offline = ask("org/one", "offline org/one")
    assert offline["parameter_count"] == online["parameter_count"]
    assert offline["source"]["revision"] == COMMIT and "local cache" in offline["notes"][0]
    (by_environment,) = ask("org/one", HF_HUB_OFFLINE="1")
    (unreachable,) = ask("org/one", HF_ENDPOINT="http://127.0.0.1:9")
    assert by_environment == unreachable == offline
    (uncached,) = ask("org/small", HF_HUB_OFFLINE="1")
    assert uncached["code"] == "not-cached"
    assert not hub.sent_bytes


def test_no_network_points_to_what_works_without(ask: Callable[..., list[dict[str, Any]]]) -> None:
    lost, known = ask("org/one", "meta-llama/Llama-2-7b-hf@main", HF_ENDPOINT="http://127.0.0.1:9")
    assert lost["code"] == "hub-unreachable" and "catalog" in lost["hint"]
    assert known["name"] == "llama-2-7b" and "could not be looked up" in known["notes"][-1]


def test_without_the_hub_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from planner.core.errors import MissingDependency
    from planner.models import resolve

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependency, match="huggingface_hub") as caught:
        resolve("org/anything")
    assert "qplan[hub]" in caught.value.hint
