"""Environments of quantizers: found, made, repaired, removed; children that run in them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import venv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from planner.core.data import data_path
from planner.core.errors import ExecutionFailed, MissingEnvironment, NeedsConfirmation, UsageError
from planner.core.hardware import Cpu, Gpu, HardwareProfile, Memory
from planner.execute import environments, installing, packages, torch_build
from planner.execute.locks import exclusive
from planner.execute.process import ALONE, Stopped, run_child, stoppable
from planner.workflow import environments as workflow
from tests.wheel_fixtures import CHILD_NEEDS, make_wheel, pack_installed

CPU = environments.torch_builds()[-1]
TINY = environments.Environment(
    name="tiny",
    title="Tiny",
    summary="quantizes nothing",
    methods=(),
    python=">=3.11",
    requires=("tinyquant==1.0",),
    accepts=("tinyquant>=1,<2", "psutil>=5"),
    modules=("tinyquant",),
    source="tests",
    date="2026-11-26",
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QPLAN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder of wheels, and what is in it of this environment."""
    folder = tmp_path_factory.mktemp("wheels")
    packed = pack_installed(folder, *CHILD_NEEDS)
    make_wheel(folder, "tinyquant", "1.0", {"tinyquant.py": "WEIGHTS = 'quantized'\n"})
    make_wheel(folder, "broken", "1.0", {"broken.py": "raise OSError('libcudart.so.13: cannot open')\n"})
    return folder, packed


@pytest.fixture
def tiny(
    wheels: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> environments.Environment:
    """An environment that is made of the folder alone."""
    folder, packed = wheels
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    packages.pip_settings.cache_clear()
    use(TINY, tmp_path, monkeypatch, {**packed, "tinyquant": "1.0"})
    return TINY


def use(
    row: environments.Environment, folder: Path, monkeypatch: pytest.MonkeyPatch, pins: dict[str, str]
) -> environments.Environment:
    """Have ``row`` and nothing else, with a lock of ``pins``."""
    lock = folder / "lock.txt"
    lock.write_text("# a lock\n" + "".join(f"{name}=={version}\n" for name, version in pins.items()))
    monkeypatch.setattr(environments, "rows", lambda: (row,))
    monkeypatch.setattr(installing, "lock_path", lambda _name, _build: lock)
    return row


def test_an_unknown_environment_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError) as raised:
        environments.python_for("gptq-for-llama")
    assert "gptqmodel" in raised.value.hint and raised.value.code == "unknown-environment"


def test_a_missing_environment_says_how_to_make_it() -> None:
    with pytest.raises(MissingEnvironment) as raised:
        environments.python_for("autoawq")
    assert raised.value.hint == "`qplan methods install autoawq`"
    assert (raised.value.code, raised.value.environment) == ("missing-dependency", "autoawq")


def test_a_child_of_another_interpreter_sees_qplan_and_nothing_of_ours(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare")
    code = (
        "import importlib.util as u, json, planner, planner.core.data as d;"
        "print(json.dumps([planner.__version__, str(d.data_path('methods.toml')), u.find_spec('pytest') is None]))"
    )
    python = environments.interpreter(tmp_path / "bare")
    done = subprocess.run([python, "-c", code], env={"PYTHONPATH": str(ALONE)}, capture_output=True, text=True)
    from planner import __version__

    assert json.loads(done.stdout) == [__version__, str(data_path("methods.toml")), True], done.stderr


def test_this_interpreter_is_used_where_it_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"bitsandbytes": "0.50.2", "transformers": "5.23.0", "accelerate": "1.15.0", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(environments.importlib.metadata, "version", lambda name: have[name])
    assert environments.python_for("bitsandbytes") == Path(sys.executable)
    assert dict(environments.status("bitsandbytes").versions)["torch"] == "2.13.0+cpu"


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_an_environment_is_made_used_and_removed(tiny: environments.Environment, installer: str, home: Path) -> None:
    if installer == "uv" and packages.uv() is None:
        pytest.skip("uv is not installed here")
    said: list[str] = []
    marker = installing.install("tiny", CPU, installer=installer, tell=lambda what, _fraction: said.append(what))
    status = environments.status("tiny")
    assert status.installed and not status.current and marker.installer == installer and said[-1] == "done"
    assert dict(status.versions)["tinyquant"] == "1.0" and status.size_bytes == marker.size_bytes > 100_000
    request, log = {"modules": ["tinyquant"]}, home / "child.log"
    child = "planner.execute.environment_child"
    seen = run_child(child, request, what="a child", log=log, python=environments.python_for("tiny"))
    assert "pytest" not in seen["versions"] and seen["versions"]["tinyquant"] == "1.0"
    freed = installing.remove("tiny")
    assert freed is not None and freed > 100_000 and environments.status("tiny").python is None
    assert installing.remove("tiny") is None


def test_what_cannot_be_imported_is_not_installed(
    wheels: tuple[Path, dict[str, str]], tiny: environments.Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = dataclasses.replace(TINY, modules=("broken",), accepts=("broken==1.0",))
    use(row, tmp_path, monkeypatch, {**wheels[1], "broken": "1.0"})
    with pytest.raises(ExecutionFailed, match="broken cannot be imported") as raised:
        installing.install("tiny", CPU, installer="pip")
    assert "libcudart" in raised.value.numbers
    assert environments.status("tiny").note == "its installation was not finished"


def test_a_package_that_the_index_lacks_says_where_mirrors_are_set(
    tiny: environments.Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(TINY, tmp_path, monkeypatch, {"tinyquant": "9.9"})
    with pytest.raises(ExecutionFailed) as raised:
        installing.install("tiny", CPU, installer="pip")
    assert "tinyquant==9.9" in raised.value.numbers and "PIP_INDEX_URL" in raised.value.hint


def test_a_killed_installation_ends_its_installer_and_is_repaired(
    tiny: environments.Environment, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the index keeps it waiting; then the same installation with an index that answers."""
    code = (
        "import sys; from pathlib import Path; from planner.execute import installing, environments as e\n"
        f"row = {TINY!r}\n".replace("Environment(", "e.Environment(")
        + f"e.rows = lambda: (row,); installing.lock_path = lambda *_: Path({str(home.parent / 'lock.txt')!r})\n"
        "installing.install('tiny', e.torch_builds()[-1], installer='pip')"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        asked = threading.Event()

        def accept() -> None:
            kept.append(silent.accept()[0])
            asked.set()

        kept: list[socket.socket] = []
        threading.Thread(target=accept, daemon=True).start()
        wheels_of_it = {k: v for k, v in os.environ.items() if k not in {"PIP_NO_INDEX", "PIP_FIND_LINKS"}}
        waiting = {**wheels_of_it, "PIP_INDEX_URL": f"http://127.0.0.1:{silent.getsockname()[1]}/simple"}
        child = subprocess.Popen([sys.executable, "-c", code], env=waiting)
        assert asked.wait(60), "pip never asked the index"
        child.send_signal(signal.SIGKILL)
        child.wait()
        kept[0].settimeout(30)
        while kept[0].recv(1 << 16):  # ends when the installer has let go of the connection
            continue
        kept[0].close()
    assert environments.interpreter(environments.folder("tiny")).exists()
    assert environments.status("tiny").note == "its installation was not finished"
    with pytest.raises(MissingEnvironment, match="not installed"):
        environments.python_for("tiny")
    installing.install("tiny", CPU, installer="pip")
    assert environments.python_for("tiny").exists()


def test_a_stopped_installation_ends_at_once_and_is_unfinished(
    tiny: environments.Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    with pytest.raises(Stopped), stoppable(stop):
        installing.install("tiny", CPU, installer="pip", tell=lambda what, _f: stop.set() if "Tiny" in what else None)
    assert environments.status("tiny").python is None


def test_two_installations_of_one_environment_do_not_mix(tiny: environments.Environment, home: Path) -> None:
    path = environments.folder("tiny").with_name("tiny.lock")
    with (
        exclusive(path, busy="", unwritable="", hint="", unwritable_hint=""),
        pytest.raises(ExecutionFailed, match="another qplan is installing tiny") as raised,
    ):
        installing.install("tiny", CPU)
    assert raised.value.code == "locked"


def test_an_environment_of_other_versions_or_of_a_python_that_is_gone_is_not_used(
    tiny: environments.Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = environments.folder("tiny")
    python = environments.interpreter(place)
    python.parent.mkdir(parents=True)
    python.write_text("")
    marker = environments.Marker(
        format_version="1.0",
        name="tiny",
        python_version="3.11",
        build="cpu",
        installer="pip",
        versions={"tinyquant": "1.0", "psutil": "7.0"},
        size_bytes=1,
        seconds=1.0,
    )

    def finish(**changed: object) -> environments.Status:
        document = dataclasses.asdict(dataclasses.replace(marker, **changed))  # type: ignore[arg-type]
        (place / environments.MARKER).write_text(json.dumps(document))
        return environments.status("tiny")

    assert finish().python == python
    assert "tinyquant>=1,<2 (found 2.1)" in str(finish(versions={"tinyquant": "2.1", "psutil": "7.0"}).note)
    assert "psutil>=5 (not there)" in str(finish(versions={"tinyquant": "1.0"}).note)
    assert "cannot be read" in str(finish(size_bytes="much").note)
    finish()
    python.unlink()
    assert "Python that it was made with is gone" in str(environments.status("tiny").note)


def machine(*gpus: Gpu) -> HardwareProfile:
    return HardwareProfile(name="m", os="linux", cpu=Cpu(model="c", architecture="x86_64"), memory=Memory(), gpus=gpus)


@pytest.mark.parametrize(
    ("driver", "capability", "build"),
    [
        ("580.95.05", "8.9", "cu130"),
        ("590.10", "12.0", "cu130"),
        ("570.124.06", "8.9", "cu126"),
        ("580.95.05", "6.1", "cu126"),
        ("470.57.02", "8.6", "cpu"),
        (None, "8.6", "cpu"),
    ],
)
def test_torch_is_the_newest_build_that_gpu_and_driver_run(driver: str | None, capability: str, build: str) -> None:
    gpu = Gpu(name="g", vendor="nvidia", backend="cuda", driver=driver, compute_capability=capability)
    assert torch_build.choose(machine(gpu)).build == build


def test_no_machine_without_an_nvidia_gpu_gets_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    amd = Gpu(name="a", vendor="amd", backend="rocm", driver="999.0", compute_capability="11.0")
    for here in (machine(), machine(amd)):
        build = torch_build.choose(here)
        assert build.build == "cpu"
        assert torch_build.index_of(build, ("torch", "nvidia-cublas", "filelock")) == build.index
        assert torch_build.index_of(build, ("torch", "filelock")) is None
    monkeypatch.setenv("TORCH_INDEX", "https://example.org/cpu")
    assert torch_build.index_of(build, ("torch", "cuda-toolkit")) == "https://example.org/cpu"


def test_a_cuda_build_comes_from_the_usual_index_only_where_that_has_it() -> None:
    newest, older = environments.torch_builds()[:2]
    assert torch_build.index_of(newest, ("torch", "nvidia-cublas")) is None
    assert torch_build.index_of(newest, ("torch",)) == newest.index
    assert torch_build.index_of(older, ("torch", "nvidia-cublas")) == older.index


@given(st.lists(st.integers(0, 999), min_size=3, max_size=3), st.lists(st.integers(0, 999), min_size=3, max_size=3))
def test_versions_of_drivers_are_compared_by_number(found: list[int], least: list[int]) -> None:
    gpu = Gpu(name="g", vendor="nvidia", backend="cuda", driver=".".join(map(str, found)), compute_capability="9.0")
    row = dataclasses.replace(environments.torch_builds()[0], min_driver=".".join(map(str, least)))
    assert torch_build._runs(row, machine(gpu)) == (found >= least)


@pytest.mark.parametrize("row", environments.rows(), ids=lambda row: row.name)
@pytest.mark.parametrize("build", [environments.torch_builds()[0], CPU], ids=lambda build: build.build)
def test_locks_pin_everything_and_name_no_index(row: environments.Environment, build: environments.TorchBuild) -> None:
    text = installing.lock_path(row.name, build).read_text()
    pins = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
    assert "://" not in text and not any(line.startswith("-") for line in text.splitlines())
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    for asked in map(Requirement, (*row.requires, *environments.child_requires())):
        assert asked.specifier.contains(versions[canonicalize_name(asked.name)])
    assert not environments.unmet(row, versions)
    assert torch_build.brings_cuda(tuple(versions)) == (build is not CPU)


def test_every_method_that_quantizers_carry_out_has_an_environment_with_a_size() -> None:
    for method, name in (("awq", "gptqmodel"), ("gptq", "gptqmodel"), ("bitsandbytes", "bitsandbytes")):
        assert workflow.named(method) == name
    for name in environments.names():
        offer = workflow.offer(name)
        assert offer.download_bytes and offer.disk_bytes and offer.download_bytes < offer.disk_bytes
        assert offer.seconds and "to" in offer.takes_time()
    with pytest.raises(UsageError, match=r"gguf needs no environment"):
        workflow.named("gguf")


def test_pips_settings_reach_uv_unless_it_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_", "SSL_"))]:
        monkeypatch.delenv(name)
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://mirror.example/simple\nfind-links = /wheels /more\ncert = /ca.pem\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    packages.pip_settings.cache_clear()
    options, variables = packages._settings_for_uv(without_index=False)
    pairs = list(zip(options[::2], options[1::2], strict=True))
    assert ("--default-index", "https://mirror.example/simple") in pairs
    assert [value for option, value in pairs if option == "--find-links"] == ["/wheels", "/more"]
    assert variables["SSL_CERT_FILE"] == "/ca.pem"
    assert "--default-index" not in packages._settings_for_uv(without_index=True)[0]
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://other.example/simple")
    assert "--default-index" not in packages._settings_for_uv(without_index=False)[0]
    packages.pip_settings.cache_clear()


def missing_until(installed: list[str]) -> None:
    if not installed:
        raise MissingEnvironment("GPTQModel is not installed", environment="gptqmodel")


def test_apply_asks_before_it_installs_and_installs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[str] = []
    monkeypatch.setattr(workflow, "install", lambda wanted, _tell: installed.append(wanted.name))
    asked: list[str] = []

    def refuse(question: str) -> bool:
        asked.append(question)
        return False

    for ask in (None, refuse):
        with pytest.raises(NeedsConfirmation) as raised:
            workflow.prepare(lambda: missing_until(installed), assume_yes=False, ask=ask)
        assert raised.value.code == "install-needs-yes" and "on disk" in raised.value.numbers
    assert "GPTQModel" in asked[0] and "to download" in asked[0] and not installed
    workflow.prepare(lambda: missing_until(installed), assume_yes=True, ask=None)
    assert installed == ["gptqmodel"]
    with pytest.raises(MissingEnvironment):  # one that stays missing is not installed for ever
        workflow.prepare(lambda: missing_until([]), assume_yes=True, ask=None)


def test_a_full_disk_is_found_before_anything_is_fetched() -> None:
    small = dataclasses.replace(workflow.offer("autoawq"), free_bytes=1 << 20)
    with pytest.raises(ExecutionFailed) as raised:
        workflow.install(small)
    assert raised.value.code == "no-space" and "1.0 MiB free" in raised.value.numbers


def qplan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "planner.cli", *arguments], capture_output=True, text=True)


def test_install_says_what_it_takes_and_needs_a_yes() -> None:
    dry = qplan("methods", "install", "awq", "--dry-run", "--json")
    offer = json.loads(dry.stdout)["offer"]
    assert dry.returncode == 0 and offer["name"] == "gptqmodel" and offer["download_bytes"] > 1e8
    refused = qplan("methods", "install", "gptq", "--json")
    assert refused.returncode == 6 and json.loads(refused.stdout)["error"]["code"] == "install-needs-yes"
    listed = json.loads(qplan("methods", "--json").stdout)
    assert [row["name"] for row in listed["environments"]] == list(environments.names())
    assert not any(row["installed"] for row in listed["environments"])
    removed = qplan("methods", "remove", "peft", "--json")
    assert removed.returncode == 0 and json.loads(removed.stdout)["freed_bytes"] is None


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_bitsandbytes_is_installed_from_the_registry_and_quantizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_RETRIES", "1")
    try:
        workflow.install(workflow.offer("bitsandbytes"))
    except ExecutionFailed as error:
        if any(word in error.numbers for word in ("onnection", "resolve", "imed out")):
            pytest.skip(f"the package registry cannot be reached: {error.numbers.splitlines()[-1]}")
        raise
    status = environments.status("bitsandbytes")
    assert status.installed and dict(status.versions)["bitsandbytes"] == "0.50.2"
    code = (
        "import torch, bitsandbytes.functional as f; w = torch.randn(256, 256, generator=torch.manual_seed(0));"
        "q, s = f.quantize_4bit(w, quant_type='nf4'); d = f.dequantize_4bit(q, s);"
        "print(q.numel(), float(((d - w) ** 2).mean() / (w ** 2).mean()))"
    )
    done = subprocess.run([str(status.python), "-c", code], capture_output=True, text=True, check=True)
    count, error = done.stdout.split()
    assert int(count) == 256 * 256 // 2 and 0.005 < float(error) < 0.015  # NF4 on a normal distribution
