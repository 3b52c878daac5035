"""``qplan doctor``."""

from __future__ import annotations

import click

from planner.cli.options import json_option
from planner.cli.output import console, print_json, table
from planner.core.errors import Exit


@click.command("doctor")
@json_option
def command(as_json: bool) -> int:
    """Check this installation: data, tools, store, machine. Exit code 1 if something qplan needs is broken."""
    from planner import FORMAT_VERSION
    from planner.core.codec import encode
    from planner.workflow.doctor import examine

    findings = examine()
    if as_json:
        print_json({"format_version": FORMAT_VERSION, "findings": [encode(finding) for finding in findings]})
    else:
        rows = table("", "what", "found", "hint")
        for finding in findings:
            colour = {"ok": "green", "missing": "yellow", "broken": "red"}[finding.state]
            rows.add_row(f"[{colour}]{finding.state}[/]", finding.what, finding.found, finding.hint)
        console().print(rows)
    return Exit.FAILED if any(finding.state == "broken" for finding in findings) else Exit.DONE
