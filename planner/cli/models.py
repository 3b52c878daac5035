"""``qplan models [NAME]``."""

from __future__ import annotations

import click

from planner.cli.options import json_option
from planner.cli.output import console, facts, print_json, table
from planner.core.errors import Exit
from planner.core.units import format_count


@click.command("models")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> int:
    """List the models known by name, or show one model's shape."""
    from planner import FORMAT_VERSION, models
    from planner.workflow.documents import model_document

    if name is not None:
        shown = model_document(models.resolve(name))
        if as_json:
            print_json({"format_version": FORMAT_VERSION, **shown})
        else:
            console().print(facts((key.replace("_", " "), _said(value)) for key, value in shown.items()))
        return Exit.DONE
    from planner.models import catalog

    entries = catalog.entries()
    if as_json:
        from planner.core.codec import encode

        print_json({"format_version": FORMAT_VERSION, "models": [encode(entry) for entry in entries]})
        return Exit.DONE
    rows = table("name", "family", "parameters>", "licence", "hub id", give_way=("hub id",))
    for entry in entries:
        size = format_count(entry.parameter_count) if entry.parameter_count else "-"
        rows.add_row(entry.name, entry.family, size, entry.license or "-", entry.hub_id or "-")
    console().print(rows)
    return Exit.DONE


def _said(value: object) -> str:
    """A value of a model's document for a person."""
    if isinstance(value, dict):
        return " · ".join(str(part) for part in value.values() if part is not None)
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else "unknown" if value is None else str(value)
