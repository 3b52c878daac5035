"""``qplan measurements``."""

from __future__ import annotations

import csv
import sys
from typing import TYPE_CHECKING

import click

from planner.cli.options import json_option
from planner.cli.output import console, print_json, table
from planner.core.errors import Exit

if TYPE_CHECKING:
    from planner.core.measurement import Measurement


@click.command("measurements")
@click.option("--csv", "as_csv", is_flag=True, help="Print as CSV.")
@click.option("--all-machines", is_flag=True, help="Not only this machine's.")
@json_option
def command(as_csv: bool, all_machines: bool, as_json: bool) -> int:
    """List what was measured here: the numbers that the next estimate on this machine uses."""
    from planner import FORMAT_VERSION
    from planner.core.codec import encode
    from planner.workflow.survey import measurements

    found = measurements(all_machines=all_machines)
    if as_json:
        print_json({"format_version": FORMAT_VERSION, "measurements": [encode(item) for item in found]})
    elif as_csv:
        write_csv(found)
    elif not found:
        click.echo("nothing was measured on this machine yet; `qplan apply` and `qplan verify` do", err=True)
    else:
        _show(found)
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
    from planner.core.wording import TITLES, quantity

    rows = table("when", "model", "type", "quantity", "predicted>", "measured>", "low - high>")
    for item in found:
        spread = f"{quantity(item.quantity, item.low)} - {quantity(item.quantity, item.high)}"
        said = quantity(item.quantity, item.predicted)
        title = TITLES.get(item.quantity, item.quantity)
        rows.add_row(item.measured_at, item.model, item.type, title, said, quantity(item.quantity, item.value), spread)
    console().print(rows)
