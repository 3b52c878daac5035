"""Child processes: results, errors, crashes, cancellation. The children are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from planner.core.errors import ExecutionFailed, Exit, InputError, Interrupted
from planner.execute.process import PARENT_GONE, Stopped, check_stopped, last_lines, run_child, stoppable

CHILD = """
import os, sys, time
from planner.core.errors import InputError
from planner.execute.process import serve

def work(request, progress):
    print("a library prints this")
    do = request["do"]
    progress(1, 2)
    if do == "fail":
        raise InputError("the file is bad", numbers="1 of 2", hint="mend it", code="bad-file")
    if do == "crash":
        sys.stderr.write("the last words\\n"); sys.stderr.flush()
        os.kill(os.getpid(), 9)
    if do == "bug":
        raise ZeroDivisionError("oops")
    if do == "hang":
        open(request["file"], "w").write(str(os.getpid()))
        time.sleep(60)
    return {"done": do}

raise SystemExit(serve(work))
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "a_child"


def test_the_result_and_the_progress_come_back_and_prints_go_to_the_log(child: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    log = tmp_path / "log"
    result = run_child(child, {"do": "x"}, what="it", log=log, progress=lambda *part: seen.append(part))
    assert result == {"done": "x"} and seen == [(1, 2)]
    assert "a library prints this" in log.read_text()


def test_an_error_of_qplan_comes_back_as_itself(child: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        run_child(child, {"do": "fail"}, what="the step", log=tmp_path / "log")
    assert caught.value.what == "the step: the file is bad"
    assert (caught.value.numbers, caught.value.hint, caught.value.code) == ("1 of 2", "mend it", "bad-file")


def test_a_killed_child_is_explained_with_its_last_words(child: str, tmp_path: Path) -> None:
    with pytest.raises(ExecutionFailed) as caught:
        run_child(child, {"do": "crash"}, what="the step", log=tmp_path / "log")
    assert "SIGKILL" in caught.value.what and "the last words" in caught.value.numbers


def test_a_bug_in_a_child_is_an_error_with_the_log(child: str, tmp_path: Path) -> None:
    with pytest.raises(ExecutionFailed) as caught:
        run_child(child, {"do": "bug"}, what="the step", log=tmp_path / "log")
    assert "ZeroDivisionError: oops" in caught.value.numbers


def test_a_child_that_takes_too_long_is_ended(child: str, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    request = {"do": "hang", "file": str(mark)}
    with pytest.raises(ExecutionFailed) as caught:
        run_child(child, request, what="the step", log=tmp_path / "log", timeout_seconds=2)
    assert caught.value.code == "timeout"
    assert gone(int(mark.read_text()))


def test_a_child_dies_with_a_parent_that_is_killed(child: str, tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    program = textwrap.dedent(f"""
        from pathlib import Path
        from planner.execute.process import run_child
        run_child("a_child", {{"do": "hang", "file": {str(mark)!r}}}, what="it", log=Path({str(tmp_path / "log")!r}))
    """)
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent.parent)
    wait_for(lambda: mark.exists() and bool(mark.read_text()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: gone(int(mark.read_text())))
    assert PARENT_GONE > 0


def test_the_end_of_a_log_leaves_out_rows_of_dots(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("one\n.....\n\ntwo\n")
    assert last_lines(log) == "one\ntwo"
    assert last_lines(tmp_path / "none") == ""


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def wait_for(condition: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_another_thread_ends_the_child_and_no_further_one_is_started(child: str, tmp_path: Path) -> None:
    stop, noted = threading.Event(), tmp_path / "pid"
    ended: list[BaseException] = []

    def work() -> None:
        with stoppable(stop):
            for name in ("first", "second"):
                try:
                    run_child(child, {"do": "hang", "file": str(noted)}, what=name, log=tmp_path / name)
                except Interrupted as error:
                    ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while not (noted.is_file() and noted.read_text()):
        time.sleep(0.02)
    stop.set()
    thread.join(20)
    assert [type(error) for error in ended] == [Stopped, Stopped] and isinstance(ended[0], Interrupted)
    assert ended[0].exit_code == Exit.INTERRUPTED and "goes on" in ended[0].hint
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), 0)
    assert not (tmp_path / "second").exists()
    check_stopped()  # the stop is that thread's alone
