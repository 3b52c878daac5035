"""Tables at the width of a terminal: no line is longer, no word is broken, and what gives way does so in order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from planner.cli.output import table
from planner.cli.recommend import memory_table
from planner.cli.tables import Table, share
from planner.core.candidate import Candidate
from planner.core.measurement import FILE_BYTES, KL_DIVERGENCE, ONE_PASS_RATE, Measurement
from planner.core.units import format_bytes
from planner.core.wording import quantity_span, span
from planner.report.charts import memory_bars
from planner.store.database import Store
from planner.workflow.estimates import computed_case
from planner.workflow.survey import survey
from tests.conftest import Qplan
from tests.report_fixtures import write_run

WORD = st.text("abcdefgh0123456789", min_size=1, max_size=12)
CELL = st.lists(WORD, max_size=4).map(" ".join)
WIDE = 400
"""At this width nothing of qplan wraps."""


def printed(made: Table, width: int) -> list[str]:
    out = Console(width=width, highlight=False, color_system=None)
    with out.capture() as captured:
        out.print(made)
    return captured.get().splitlines()


@given(
    width=st.integers(30, 130),
    heads=st.lists(st.tuples(CELL.filter(bool), st.booleans()), min_size=1, max_size=7),
    cells=st.lists(st.lists(CELL, min_size=7, max_size=7), min_size=1, max_size=5),
)
def test_no_word_is_broken_and_no_line_is_too_long(
    width: int, heads: list[tuple[str, bool]], cells: list[list[str]]
) -> None:
    made = table(*(f"{name}{'>' * right}" for name, right in heads))
    for row in cells:
        made.add_row(*row[: len(heads)])
    lines = printed(made, width)
    assert all(len(line) <= width for line in lines)
    words = {word for line in lines for word in line.split()}
    # Records put a heading beside its cell: only there can a heading be too long to stand with a word.
    if max(len(name) for name, _ in heads) + 2 + 12 <= width:
        assert {word for row in cells for cell in row[: len(heads)] for word in cell.split()} <= words


def test_a_table_takes_room_from_gaps_then_headings_then_columns_then_text() -> None:
    made = table("name of it", "first number>", "second number>", "note", give_way=("second number>",))
    made.add_row("one", "1.5 MiB", "2.5 MiB", "a note of words")
    assert printed(made, 61)[1].rstrip() == " name of it   first number   second number   note"
    assert printed(made, 60)[1].rstrip() == " name of it  first number  second number  note", "narrower gaps"
    heads = [line.split() for line in printed(made, 57)[1:3]]
    assert heads == [["second"], ["name", "of", "it", "first", "number", "number", "note"]], "a heading wraps"
    assert printed(made, 41)[-2].split() == ["one", "1.5", "MiB", "2.5", "MiB", "a", "note", "of", "words"]
    assert printed(made, 40)[-2].split() == ["one", "1.5", "MiB", "a", "note", "of", "words"], "a column gave way"
    assert printed(made, 31)[-3].split() == ["one", "1.5", "MiB", "a", "note", "of"], "text wraps, numbers do not"


def test_where_no_table_fits_rows_are_lines_with_every_column() -> None:
    made = table("artifact", "size>", "left out>", title="made", give_way=("left out>",))
    made.add_row("Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf", "4.58 GiB", "12")
    made.add_row("", "1 B")
    lines = [line.rstrip() for line in printed(made, 50)]
    assert any(line.endswith("Q4_K_M.gguf  4.58 GiB") for line in lines), "beside each other"
    lines = [line.rstrip() for line in printed(made, 49)]
    assert lines == [
        "",
        "made",
        "artifact  Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf",
        "size      4.58 GiB",
        "left out  12",
        "",
        "size  1 B",
        "",
    ]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=8), st.integers(0, 200))
def test_room_is_shared_between_least_and_most(columns: list[tuple[int, int]], extra: int) -> None:
    least, most = [low for low, _ in columns], [low + more for low, more in columns]
    got = share(least, most, sum(least) + extra)
    assert all(low <= width <= high for low, width, high in zip(least, got, most, strict=True))
    assert sum(got) == min(sum(least) + extra, sum(most))
    growing = [width for width, low, high in zip(got, least, most, strict=True) if width < high]
    grown = [width for width, low in zip(got, least, strict=True) if width > low]
    assert not growing or not grown or max(grown) <= min(growing) + 1, "none grew past one that wants more"


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        ("7.31 MiB", "43.96 MiB", "7.31 - 43.96 MiB"),
        ("980 KiB", "1.20 MiB", "980 KiB - 1.20 MiB"),
        ("3 s", "1 min 3 s", "3 s - 1 min 3 s"),
        ("3 min 20 s", "5 min 20 s", "3 min 20 s - 5 min 20 s"),
        ("0.9987", "1.0025", "0.9987 - 1.0025"),
    ],
)
def test_a_range_names_a_shared_unit_once(low: str, high: str, said: str) -> None:
    assert span(low, high) == said
    assert quantity_span(FILE_BYTES, 3 << 20, 4 << 20) == "3.00 - 4.00 MiB"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    return [str(write_run(folder / name, name).parent) for name in ("Q4_K_M", "Q8_0", "IQ3_XS", "Q6_K", "Q5_K_S")]


def words_at(qplan: Qplan, width: int, *arguments: str) -> list[str]:
    done = qplan(*arguments, COLUMNS=str(width))
    assert done.returncode == 0, done.stderr
    plot = "│┤└"
    return [word for line in done.stdout.splitlines() if not set(plot) & set(line) for word in line.split()]


def unheard(narrow: list[str], wide: list[str]) -> list[str]:
    """Words that only a narrow terminal shows, as it broke them; rules are no words."""
    return [word for word in set(narrow) - set(wide) if word.strip("─")]


@pytest.mark.parametrize("count", [2, 3])
def test_few_runs_stand_side_by_side_with_their_ranges(runs: list[str], qplan: Qplan, count: int) -> None:
    narrow = words_at(qplan, 80, "compare", *runs[:count])
    assert unheard(narrow, words_at(qplan, WIDE, "compare", *runs[:count])) == []
    shown = qplan("compare", *runs[:count], COLUMNS="80").stdout
    assert "perplexity ratio" in shown and "KL divergence, nats" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert " MiB - " not in shown, "a range names its unit once"


def test_many_runs_are_a_row_each_with_what_lies_outside_marked(runs: list[str], qplan: Qplan) -> None:
    shown = qplan("compare", *runs, COLUMNS="80").stdout
    assert all(len(line) <= 80 for line in shown.splitlines())
    rows = [line for line in shown.splitlines() if line.startswith(" GGUF ")]
    assert [row.split()[1] for row in rows] == [Path(run).name for run in runs]
    assert all("!" in row for row in rows), "a hundredth of the speed that was expected"
    assert "--json" in shown
    assert "95 % range" in qplan("compare", *runs, COLUMNS="140").stdout.splitlines()[-1], "there is room for all"


VERBS = {
    "recommend": ("recommend", "llama-2-13b", "--profile", "rtx-4090", "--methods", "gguf,awq"),
    "finetune": ("recommend", "llama-3.1-8b", "--profile", "rtx-4090", "--objective", "finetune"),
    "frontier": ("frontier", "llama-2-13b", "--profile", "rtx-4090"),
    "methods": ("methods",),
    "models": ("models",),
    "profiles": ("profiles",),
    "quality": ("quality", "--table", "llama-2-13b"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_breaks_a_word_at_80_columns(qplan: Qplan, verb: str) -> None:
    narrow, wide = (words_at(qplan, width, *VERBS[verb]) for width in (80, WIDE))
    assert unheard(narrow, wide) == []


@pytest.mark.parametrize("arguments", [("models", "llama-2-7b"), ("probe", "--profile", "rtx-4090")])
def test_facts_are_a_line_each_at_80_columns_and_without_a_heading(qplan: Qplan, arguments: tuple[str, ...]) -> None:
    lines = qplan(*arguments, COLUMNS="80").stdout.splitlines()
    assert max(map(len, lines)) <= 80 and not any("─" in line for line in lines)
    name = "layers" if arguments[0] == "models" else "cores"
    assert any(line.split()[:1] == [name] and len(line.split()) > 1 for line in lines)


def test_measurements_are_a_line_each_at_80_columns(qplan: Qplan) -> None:
    here = survey()
    measured = Measurement(
        quantity=ONE_PASS_RATE,
        model="qwen2.5-0.5b",
        model_sha256="ab" * 32,
        method="gguf",
        runtime="llama.cpp",
        type="Q4_K_M",
        value=6454693.5123,
        low=6454693.5123,
        high=6454693.5123,
        predicted=10623224.35,
        hardware_identity=here.identity(),
        measured_at="2026-11-27T02:07:42+00:00",
    )
    with Store() as store:
        store.add([measured, replace(measured, quantity=KL_DIVERGENCE, value=0.0059, low=0.0058, high=0.0061)])
    (rate, divergence) = [line for line in qplan("measurements", COLUMNS="80").stdout.splitlines() if "2026" in line]
    assert rate.split()[:2] == ["2026-11-27", "02:07"] and "one pass, weights/s" in rate and "6.5 M" in rate
    assert "KL divergence, nats" in divergence and "0.0059" in divergence
    assert "0.0058 - 0.0061" in qplan("measurements", COLUMNS="120").stdout


def test_the_memory_of_a_table_and_of_a_page_adds_up_to_what_must_fit() -> None:
    """Interleaved weights: a copy that is held, and pages of the file that the system may drop."""
    case = {"model": "llama-3.1-8b", "method": "gguf", "type": "Q4_0", "profile": "laptop-8gb", "context": 8192}
    _, variant, placement, _, made = computed_case(case)
    host = made.memory.host
    assert host.reclaimable_bytes > 0 and host.total_bytes > (host.capacity_bytes or 0) > host.needed_bytes
    held = (host.weights_bytes, host.kv_cache_bytes, host.compute_bytes, host.needed_overhead_bytes)
    assert sum(held) == host.needed_bytes
    text = "\n".join(printed(memory_table(Candidate(variant=variant, placement=placement, estimate=made)), 100))
    for size in (*held, host.needed_bytes, host.capacity_bytes):
        assert format_bytes(size) in text
    (bar,) = memory_bars([host])
    assert bar.total == format_bytes(host.needed_bytes) and bar.limit is None
    assert sum(part.width for part in bar.parts) <= 100
