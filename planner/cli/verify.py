"""``qplan verify ARTIFACT|PLAN``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from planner.cli.options import Finite, existing, json_option
from planner.cli.output import print_json
from planner.core.errors import Exit

if TYPE_CHECKING:
    from planner.core.plan import Plan


@click.command("verify")
@click.argument("target")
@click.option(
    "--reference", metavar="PATH", help="The 16-bit model to compare quality with: a checkpoint or GGUF file."
)
@click.option("--text", metavar="FILE", help="Held-out text; default: the one that comes with qplan.")
@click.option("--output", metavar="DIR", help="Where a plan's artifact lies; default: beside the plan.")
@click.option("--seconds", type=Finite(5), default=240.0, show_default=True, help="Time to measure.")
@json_option
def command(
    target: str, reference: str | None, text: str | None, output: str | None, seconds: float, as_json: bool
) -> int:
    """Measure a GGUF file, a checkpoint directory or the artifact of a plan, and print predicted beside measured.

    What is measured is remembered and used by the next estimate on this machine.
    """
    from planner.cli.apply import Watching
    from planner.cli.show import show_report
    from planner.workflow.verifying import verify

    path = existing(target)
    plan = _plan(path) if path.suffix == ".json" else None
    artifact = path if plan is None else (existing(output) if output else path.absolute().parent) / plan.artifact
    with Watching() as watcher:
        outcome = verify(
            artifact,
            plan=plan,
            reference=existing(reference) if reference else None,
            text=existing(text) if text else None,
            budget_seconds=seconds,
            progress=watcher.measuring(),
        )
    print_json(outcome.report) if as_json else show_report(outcome.report)
    return Exit.DONE if outcome.ok else Exit.OUTSIDE


def _plan(path: Path) -> Plan:
    from planner.workflow.planning import load_plan

    return load_plan(path)
