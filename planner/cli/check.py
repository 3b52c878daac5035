"""``qplan check PLAN``."""

from __future__ import annotations

import click

from planner.cli.options import existing, json_option
from planner.cli.output import print_json
from planner.core.errors import Exit


@click.command("check")
@click.argument("plan")
@click.option("--output", default=".", show_default=True, metavar="DIR", help="Where it would be applied.")
@json_option
def command(plan: str, output: str, as_json: bool) -> int:
    """Check that PLAN can be applied here and now: unedited, this machine, the same model, room, tools."""
    from planner import FORMAT_VERSION
    from planner.workflow.applying import check
    from planner.workflow.planning import load_plan

    loaded = load_plan(existing(plan))
    here = check(loaded, existing(output))
    if as_json:
        print_json({"format_version": FORMAT_VERSION, "ok": True, "plan_sha256": loaded.content_sha256})
    else:
        click.echo(f"{plan} can be applied on {here.name}")
    return Exit.DONE
