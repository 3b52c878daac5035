"""Measurements as a table: written as CSV or Parquet, predicted against measured, one machine against another.

pandas is imported when one of these is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.core.codec import encode
from planner.core.errors import InputError, MissingDependency, UsageError
from planner.core.measurement import DECODE, PEAK_MEMORY, PREFILL, QUANTITIES, Measurement
from planner.core.submission import Imported, Submission
from planner.workflow.sharing import imported, nothing_measured, read_submission
from planner.workflow.survey import measurements, survey

if TYPE_CHECKING:
    import pandas as pd

HERE, IMPORTED = "here", "imported"
GROUPS = ("quantity", "method", "type", "device")
"""What errors are added up by."""
GROUPABLE = (*GROUPS, "model", "runtime", "tool_version", "source", "kv_type", "gpu_layers", "threads")
_CASE = ("quantity", "model_sha256", "method", "runtime", "type", "group_size", "imatrix")
_CONDITIONS = ("depth", "kv_type", "flash_attention", "cpu_expert_layers")
_OF_QUANTITY = {PREFILL: ("prompt_tokens", "ubatch"), PEAK_MEMORY: ("context", "ubatch")}
_OF_MACHINE = ("threads", "gpu_layers")
"""Conditions that are each machine's own: compared on one machine only."""
_SPEEDS = (DECODE, PREFILL)


def _pandas(parquet: bool = False) -> Any:
    try:
        import pandas

        if parquet:
            import pyarrow  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "pandas is needed to compare measurements and to write CSV and Parquet",
            numbers=str(error),
            hint="`pip install 'qplan[analysis]'`; `qplan measurements --csv` prints without it",
        ) from None
    return pandas


def rows_of(found: Sequence[Measurement], *, source: str = HERE, device: str = "") -> list[dict[str, Any]]:
    """One flat row a measurement; the conditions are columns of their own."""
    rows = []
    for item in found:
        row = encode(item)
        conditions = row.pop("conditions")
        row["samples"] = " ".join(map(str, row["samples"]))
        rows.append({"source": source, "device": device or item.hardware_name, **row, **conditions})
    return rows


def rows_of_submission(submission: Submission, source: str) -> list[dict[str, Any]]:
    """The same of a submission."""
    machine, rows = submission.hardware, []
    for item in submission.measurements:
        row = encode(item)
        conditions, day = row.pop("conditions"), row.pop("date")
        row["samples"] = " ".join(map(str, row["samples"]))
        named = {"hardware_identity": machine.identity, "hardware_name": machine.device, "measured_at": day}
        rows.append({"source": source, "device": machine.device, **row, **named, **conditions})
    return rows


def own_rows(*, all_machines: bool = False) -> list[dict[str, Any]]:
    """What was measured here, or on every machine that this store has seen."""
    here = survey()
    device = here.gpus[0].name if here.gpus else here.cpu.model
    rows = []
    for item in measurements(all_machines=all_machines):
        mine = item.hardware_identity == here.identity()
        rows += rows_of([item], device=device if mine else item.hardware_name)
    return rows


def export(path: Path, *, all_machines: bool = False) -> int:
    """Write the measurements as CSV, Parquet or JSON by the file's ending; how many they are.

    Raises:
        InputError: nothing was measured, or the file cannot be written.
        UsageError: another ending.
        MissingDependency: pandas, or for Parquet pyarrow, is not installed.
    """
    ending = path.suffix.lower()
    if ending not in (".csv", ".parquet", ".json"):
        raise UsageError(
            f"{path.name} has no ending that says how to write it",
            hint="name it FILE.csv, FILE.parquet or FILE.json",
            code="unknown-format",
        )
    found = own_rows(all_machines=all_machines)
    if not found:
        raise nothing_measured()
    if ending == ".json":
        import json

        from planner.core.codec import write_atomically
        from planner.workflow.sharing import document

        text = json.dumps(document(measurements(all_machines=all_machines)), indent=2, ensure_ascii=False)
        write_atomically(path, text + "\n")
        return len(found)
    frame = _pandas(parquet=ending == ".parquet").DataFrame(found)
    try:
        frame.to_csv(path, index=False) if ending == ".csv" else frame.to_parquet(path, index=False)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written",
            numbers=error.strerror or str(error),
            hint="name a file in a folder that you can write",
            code="unwritable-file",
        ) from None
    return len(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A table of results: names of columns, and rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]


def errors(rows: Sequence[dict[str, Any]], by: Sequence[str] = GROUPS) -> Comparison:
    """Predicted against measured: how far off, by group.

    ``ratio`` is the median of measured over predicted; errors are of its logarithm, so that twice and half are as far.

    Raises:
        UsageError: a column that nothing can be grouped by.
    """
    unknown = [name for name in by if name not in GROUPABLE]
    if unknown:
        raise UsageError(f"{unknown[0]!r} is nothing to group by", hint=f"some of {', '.join(GROUPABLE)}")
    pandas = _pandas()
    import numpy as np

    frame = pandas.DataFrame(rows)
    title = "predicted against measured"
    columns = (*by, "count", "ratio", "median_error", "mean_error", "p90_error", "worst_error")
    if not frame.empty:
        frame = frame[frame["predicted"].notna() & frame["quantity"].isin(QUANTITIES)]
        frame = frame[(frame["predicted"] > 0) & (frame["value"] > 0)]
    if frame.empty:
        return Comparison(title=title, columns=columns, rows=())
    logs = np.log(frame["value"].astype(float) / frame["predicted"].astype(float))
    off = np.expm1(logs.abs())
    grouped = frame.assign(log=logs, off=off).groupby(list(by), dropna=False, sort=True)
    table = grouped.agg(
        count=("off", "size"),
        ratio=("log", lambda column: float(np.exp(column.median()))),
        median_error=("off", "median"),
        mean_error=("off", "mean"),
        p90_error=("off", lambda column: float(column.quantile(0.9))),
        worst_error=("off", "max"),
    )
    return Comparison(title=title, columns=columns, rows=_records(table.reset_index()))


def side_by_side(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], names: tuple[str, str]) -> Comparison:
    """Cases that both hold, with the ratio of the second to the first.

    On one machine the newest of each case counts; between two, threads and layers on a GPU are each machine's own, and
    its best counts.
    """
    pandas = _pandas()
    title = f"{names[1]} (second) against {names[0]} (first)"
    same_columns = ("quantity", "model", "type", *_CONDITIONS, "prompt_tokens")
    columns = (*same_columns, "first", "second", "ratio")
    first, second = pandas.DataFrame(one), pandas.DataFrame(other)
    if first.empty or second.empty:
        return Comparison(title=title, columns=columns, rows=())
    machines = set(first["hardware_identity"]) | set(second["hardware_identity"])
    same = len(machines) == 1
    left, right = (_one_of_each(frame, same) for frame in (first, second))
    both = left.merge(right, left_index=True, right_index=True, suffixes=("_a", "_b"))
    rows = [
        {
            **{name: getattr(row, f"{name}_a") for name in same_columns},
            "first": float(row.value_a),
            "second": float(row.value_b),
            "ratio": float(row.value_b / row.value_a) if row.value_a else None,
        }
        for row in both.itertuples()
    ]
    return Comparison(title=title, columns=columns, rows=tuple(_plain(row) for row in rows))


def _one_of_each(frame: pd.DataFrame, same_machine: bool) -> pd.DataFrame:
    """One row of each case, under a key."""
    keys = [_key(row, same_machine) for row in frame.to_dict("records")]
    keyed = frame.assign(key=keys)
    if same_machine:
        return keyed.sort_values("measured_at", kind="stable").groupby("key").tail(1).set_index("key")
    rank = keyed["value"].where(keyed["quantity"].isin(_SPEEDS), -keyed["value"])
    return keyed.assign(rank=rank).sort_values("rank", kind="stable").groupby("key").tail(1).set_index("key")


def _key(row: dict[str, Any], same_machine: bool) -> str:
    names = [*_CASE, *_CONDITIONS, *_OF_QUANTITY.get(row["quantity"], ()), *(_OF_MACHINE if same_machine else ())]
    return "|".join(_text(row[name]) for name in names)


def _text(value: Any) -> str:
    """Numbers of a column with gaps are floats."""
    if value is None or value != value:  # NaN
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _records(frame: pd.DataFrame) -> tuple[dict[str, Any], ...]:
    return tuple(_plain(row) for row in frame.to_dict("records"))


def _plain(row: dict[Any, Any]) -> dict[str, Any]:
    """Without numpy's types and NaN."""
    return {str(name): _scalar(value) for name, value in row.items()}


def _scalar(value: Any) -> Any:
    plain = value.item() if hasattr(value, "item") else value
    return None if plain is None or plain != plain else plain


def compare(selectors: Sequence[str], by: Sequence[str] = GROUPS) -> tuple[Comparison, ...]:
    """What ``qplan measurements compare`` shows.

    Args:
        selectors: none: predictions against everything, and this machine against what was imported; one or two of
            ``here``, ``imported``, a submission file, the name or hash of an imported one, or a version of a tool.

    Raises:
        UsageError: a selector means nothing, or there are more than two.
        InputError: a file cannot be read.
        MissingDependency: pandas is not installed.
    """
    _pandas()
    if len(selectors) > 2:
        raise UsageError("only two can be compared", numbers=f"{len(selectors)} were named")
    others = imported()
    mine, theirs = own_rows(), _of_imported(others)
    if not selectors:
        found = [errors([*mine, *theirs], by)]
        return (*found, *([side_by_side(mine, theirs, (HERE, IMPORTED))] if theirs else []))
    chosen = [_selected(text, mine, others) for text in selectors]
    if len(chosen) == 1:
        return (errors(chosen[0], by), side_by_side(mine, chosen[0], (HERE, selectors[0])))
    return (side_by_side(chosen[0], chosen[1], (selectors[0], selectors[1])),)


def _of_imported(others: Sequence[Imported]) -> list[dict[str, Any]]:
    return [row for one in others for row in rows_of_submission(one.submission, one.source)]


def _selected(text: str, mine: list[dict[str, Any]], others: Sequence[Imported]) -> list[dict[str, Any]]:
    if text == HERE:
        return mine
    if text == IMPORTED:
        return _of_imported(others)
    path = Path(text)
    if path.is_file():
        return rows_of_submission(read_submission(path), path.name)
    named = [one for one in others if one.source == text or (len(text) >= 6 and one.sha256.startswith(text))]
    if named:
        return _of_imported(named)
    of_tool = [row for row in [*mine, *_of_imported(others)] if text and text in row["tool_version"]]
    if of_tool:
        return of_tool
    tools = sorted({row["tool_version"] for row in mine if row["tool_version"]})
    known = [HERE, IMPORTED, *(one.source for one in others), *tools]
    raise UsageError(
        f"{text!r} is nothing that was measured", hint=f"a file, or one of {', '.join(known)}", code="unknown-source"
    )


def document(found: Sequence[Comparison]) -> dict[str, Any]:
    """What ``qplan measurements compare --json`` prints."""
    from planner import FORMAT_VERSION

    return {"format_version": FORMAT_VERSION, "comparisons": [encode(one) for one in found]}
