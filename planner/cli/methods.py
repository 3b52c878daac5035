"""``qplan methods``."""

from __future__ import annotations

import click

from planner.cli.options import json_option
from planner.cli.output import console, print_json, table
from planner.core.errors import Exit


@click.command("methods")
@json_option
def command(as_json: bool) -> int:
    """List the quantization methods: what they are, whether apply carries them out, what is installed."""
    from planner import FORMAT_VERSION, methods
    from planner.core.codec import encode
    from planner.execute.preflight import missing_packages

    found = [(row, missing_packages(row.name)) for row in methods.rows()]
    if as_json:
        document = [{**encode(row), "missing_packages": list(missing)} for row, missing in found]
        print_json({"format_version": FORMAT_VERSION, "methods": document})
        return Exit.DONE
    rows = table("method", "what it is", "calibration text", "apply")
    for row, missing in found:
        state = "planned and printed only" if not row.executable else "ready"
        rows.add_row(row.name, row.summary, row.calibration_text, f"needs {', '.join(missing)}" if missing else state)
    console().print(rows)
    return Exit.DONE
