"""``qplan report RUN``."""

from __future__ import annotations

import webbrowser

import click

from planner.cli.options import existing, json_option
from planner.cli.output import print_json
from planner.core.errors import Exit


@click.command("report")
@click.argument("run")
@click.option("-o", "--output", metavar="FILE", help="The page; default: report.html beside report.json.")
@click.option("--open", "opened", is_flag=True, help="Open it in the browser.")
@json_option
def command(run: str, output: str | None, opened: bool, as_json: bool) -> int:
    """Write the report of RUN as one HTML file that needs no network.

    RUN is a report.json, the folder it is in, or the artifact it is about. `qplan apply` writes the page too.
    """
    from planner import FORMAT_VERSION
    from planner.workflow.reporting import find_report, write_report_page

    path = write_report_page(run, existing(output) if output else None)
    if as_json:
        print_json({"format_version": FORMAT_VERSION, "report": str(find_report(run)), "page": str(path)})
    else:
        click.echo(path)
    if opened and not webbrowser.open(path.absolute().as_uri()):
        click.echo("no browser could be opened; open the file in one yourself", err=True)
    return Exit.DONE
