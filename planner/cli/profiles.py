"""``qplan profiles``."""

from __future__ import annotations

import click

from planner.cli.options import json_option
from planner.cli.output import console, print_json, table
from planner.core.errors import Exit
from planner.core.units import format_bytes


@click.command("profiles")
@json_option
def command(as_json: bool) -> int:
    """List the captured machines that --profile plans for."""
    from planner import FORMAT_VERSION
    from planner.workflow.documents import hardware_document
    from planner.workflow.survey import profiles

    found = profiles()
    if as_json:
        document = [{"profile": name, **hardware_document(machine)} for name, machine in found]
        print_json({"format_version": FORMAT_VERSION, "profiles": document})
        return Exit.DONE
    rows = table("profile", "GPUs", "CPU", "RAM>")
    for name, machine in found:
        gpus = ", ".join(f"{gpu.name} {format_bytes(gpu.memory_total_bytes)}" for gpu in machine.gpus) or "none"
        rows.add_row(name, gpus, machine.cpu.model, format_bytes(machine.memory.total_bytes))
    console().print(rows)
    return Exit.DONE
