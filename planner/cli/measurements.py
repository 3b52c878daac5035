"""``qplan measurements``: list, share, import and compare."""

from __future__ import annotations

import csv
import sys
from typing import TYPE_CHECKING, Any

import click

from planner.cli.options import existing, json_option, names
from planner.cli.output import console, escape, print_json, table
from planner.core.errors import Exit, UsageError

if TYPE_CHECKING:
    from planner.core.measurement import Measurement
    from planner.core.submission import Imported
    from planner.workflow.analysis import Comparison
    from planner.workflow.sharing import Checked

GIVE_WAY = ("mean_error", "p90_error", "cpu_expert_layers", "flash_attention", "prompt_tokens")
"""Columns of a comparison that a narrow terminal can do without."""


@click.group("measurements", invoke_without_command=True)
@click.option("--csv", "as_csv", is_flag=True, help="Print as CSV.")
@click.option("--all-machines", is_flag=True, help="Not only this machine's.")
@json_option
@click.pass_context
def command(context: click.Context, as_csv: bool, all_machines: bool, as_json: bool) -> int:
    """List what was measured here: the numbers that the next estimate on this machine uses.

    Without a further word as `qplan measurements list`.
    """
    if context.invoked_subcommand is not None:
        if as_csv or all_machines or as_json:
            raise UsageError(f"options go behind {context.invoked_subcommand!r}")
        return Exit.DONE
    return _list(as_csv, all_machines, as_json, with_imported=False)


@command.command("list")
@click.option("--csv", "as_csv", is_flag=True, help="Print as CSV.")
@click.option("--all-machines", is_flag=True, help="Not only this machine's.")
@click.option("--imported", "with_imported", is_flag=True, help="Also what was imported from other people.")
@json_option
def list_command(as_csv: bool, all_machines: bool, with_imported: bool, as_json: bool) -> int:
    """List what was measured here."""
    return _list(as_csv, all_machines, as_json, with_imported=with_imported)


@command.command("export")
@click.argument("file")
@click.option(
    "--share", "to_share", is_flag=True, help="As a submission for other people: no host, user or path in it."
)
@click.option("--all-machines", is_flag=True, help="Not only this machine's.")
def export_command(file: str, to_share: bool, all_machines: bool) -> int:
    """Write what was measured here to FILE.csv, FILE.parquet or FILE.json."""
    path = existing(file)
    if not to_share:
        from planner.workflow.analysis import export

        click.echo(f"{export(path, all_machines=all_machines)} measurements in {path}", err=True)
        return Exit.DONE
    from planner.workflow.sharing import share

    if path.suffix.lower() != ".json":
        raise UsageError(f"{path.name} is no JSON file", hint="a submission is FILE.json", code="unknown-format")
    if all_machines:
        raise UsageError("a submission is of one machine", hint="leave --all-machines out")
    made = share(path)
    click.echo(f"{len(made.measurements)} measurements of {made.hardware.device} in {path}", err=True)
    return Exit.DONE


@command.command("import")
@click.argument("files", nargs=-1, required=True)
@json_option
def import_command(files: tuple[str, ...], as_json: bool) -> int:
    """Take submissions of other people in, for `list --imported` and `compare`.

    They are never mixed with what was measured here, and no estimate uses them.
    """
    from planner import FORMAT_VERSION
    from planner.workflow.sharing import import_files

    added = import_files([existing(file) for file in files])
    if as_json:
        rows = [{"file": str(a.path), "measurements": len(a.submission.measurements), "new": a.new} for a in added]
        print_json({"format_version": FORMAT_VERSION, "imported": rows})
        return Exit.DONE
    for one in added:
        what = f"{len(one.submission.measurements)} measurements of {one.submission.hardware.device}"
        click.echo(f"{one.path}: {what}" if one.new else f"{one.path}: is there already", err=True)
    return Exit.DONE


@command.command("check")
@click.argument("files", nargs=-1, required=True)
@json_option
def check_command(files: tuple[str, ...], as_json: bool) -> int:
    """Check whether submissions have the right form and can be true."""
    from planner.workflow.sharing import check

    found = check([existing(file) for file in files])
    print_json(_checked_document(found)) if as_json else _show_checked(found)
    return Exit.DONE if all(one.ok for one in found) else Exit.FAILED


@command.command("compare")
@click.argument("what", nargs=-1, metavar="[A] [B]")
@click.option("--by", metavar="A,B", help="Group prediction errors by these; default: quantity,method,type,device.")
@json_option
def compare_command(what: tuple[str, ...], by: str | None, as_json: bool) -> int:
    """Compare predictions with measurements, and measurements of A with those of B.

    A and B: `here`, `imported`, a submission file, the name of an imported one, or a tool version as in
    "llama-cpp-python 0.3.36". With A alone: this machine against A.
    """
    from planner.workflow.analysis import GROUPS, compare, document

    found = compare(what, names(by) or GROUPS)
    print_json(document(found)) if as_json else _show_comparisons(found)
    return Exit.DONE


@command.command("schema")
def schema_command() -> int:
    """Print the JSON Schema of a submission."""
    from planner.workflow.sharing import schema

    print_json(schema())
    return Exit.DONE


def _list(as_csv: bool, all_machines: bool, as_json: bool, *, with_imported: bool) -> int:
    from planner.workflow.sharing import document, imported
    from planner.workflow.survey import measurements

    found = measurements(all_machines=all_machines)
    others = imported() if with_imported else ()
    if as_json:
        print_json(document(found, others))
    elif as_csv:
        write_csv(found)
    elif not found and not others:
        click.echo("nothing was measured on this machine yet; `qplan apply` and `qplan verify` do", err=True)
    else:
        _show(found)
        _show_imported(others)
    return Exit.DONE


def write_csv(found: tuple[Measurement, ...]) -> None:
    """One row per measurement; the conditions are columns of their own."""
    from planner.core.codec import encode

    rows = []
    for item in found:
        row = encode(item)
        conditions = row.pop("conditions")
        row["samples"] = " ".join(map(str, row["samples"]))
        rows.append({**row, **conditions})
    if rows:
        writer = csv.DictWriter(sys.stdout, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _show(found: tuple[Measurement, ...]) -> None:
    from planner.core.wording import TITLES, quantity, quantity_span

    columns = ("when, UTC", "model", "type", "quantity", "predicted>", "measured>", "low - high>")
    rows = table(*columns, give_way=("low - high>", "predicted>"))
    for item in found:
        spread = quantity_span(item.quantity, item.low, item.high) if item.low < item.high else ""
        said, value = quantity(item.quantity, item.predicted), quantity(item.quantity, item.value)
        title = TITLES.get(item.quantity, item.quantity)
        rows.add_row(_minute(item.measured_at), escape(item.model), item.type, title, said, value, spread)
    console().print(rows)


def _minute(moment: str) -> str:
    """An ISO 8601 time without seconds and zone: ``2026-11-27 02:07``."""
    return moment[:16].replace("T", " ")


def _show_imported(others: tuple[Imported, ...]) -> None:
    from planner.core.wording import TITLES, quantity

    for one in others:
        submission = one.submission
        columns = ("day", "model", "type", "quantity", "predicted>", "measured>", "tool")
        rows = table(*columns, give_way=("tool",))
        for item in submission.measurements:
            said, value = quantity(item.quantity, item.predicted), quantity(item.quantity, item.value)
            title = TITLES.get(item.quantity, item.quantity)
            rows.add_row(item.date, escape(item.model), item.type, title, said, value, escape(item.tool_version))
        out = console()
        out.print(
            f"[bold]{escape(submission.hardware.device)}[/], imported from {escape(one.source)} ({one.sha256[:8]})"
        )
        out.print(rows)


def _checked_document(found: tuple[Checked, ...]) -> dict[str, Any]:
    from planner import FORMAT_VERSION
    from planner.core.codec import encode

    files = [
        {
            "file": str(one.path),
            "ok": one.ok,
            "error": {"code": one.error.code, "message": one.error.what, "numbers": one.error.numbers}
            if one.error
            else None,
            "complaints": [encode(complaint) for complaint in one.complaints],
        }
        for one in found
    ]
    return {"format_version": FORMAT_VERSION, "ok": all(one.ok for one in found), "files": files}


def _show_checked(found: tuple[Checked, ...]) -> None:
    from planner.workflow.sharing import complaint_line

    for one in found:
        if one.submission is None:
            assert one.error is not None
            click.echo(f"{one.path}: {one.error}")
            continue
        count = f"{len(one.submission.measurements)} measurements of {one.submission.hardware.device}"
        click.echo(f"{one.path}: {count}: {'fine' if one.ok else f'{len(one.complaints)} complaints'}")
        for complaint in one.complaints:
            click.echo(f"  {complaint_line(complaint)}")


def _show_comparisons(found: tuple[Comparison, ...]) -> None:
    for one in found:
        out = console()
        out.print(f"[bold]{escape(one.title)}[/]")
        if not one.rows:
            out.print("  nothing that can be compared")
            continue
        columns = [name for name in one.columns if any(row[name] is not None for row in one.rows)]
        heads = {name: f"{name.replace('_', ' ')}{'>' * _is_number(one, name)}" for name in columns}
        rows = table(*heads.values(), give_way=[heads[name] for name in GIVE_WAY if name in heads])
        for row in one.rows:
            rows.add_row(*(escape(_cell(name, row[name], row)) for name in columns))
        out.print(rows)


def _is_number(one: Comparison, name: str) -> bool:
    return all(isinstance(row[name], (int, float)) or row[name] is None for row in one.rows)


def _cell(name: str, value: Any, row: dict[str, Any]) -> str:
    from planner.core.wording import TITLES, quantity

    if value is None:
        return "-"
    if name == "quantity":
        return TITLES.get(str(value), str(value))
    if name.endswith("_error"):
        return f"{100 * value:.1f} %"
    if name == "ratio":
        return f"{value:.3f}"
    if isinstance(value, float):
        return quantity(row["quantity"], value) if "quantity" in row else f"{value:.3g}"
    return str(value)
