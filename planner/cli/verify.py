"""``qplan verify ARTIFACT|PLAN``."""

from __future__ import annotations

import click

from planner.cli.options import Finite, existing, json_option
from planner.cli.output import print_json
from planner.core.errors import Exit


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
    """Measure a GGUF file, a checkpoint directory or the artifact of a plan or run; print predicted beside measured.

    What is measured is remembered and used by the next estimate on this machine.
    """
    from planner.cli.apply import Watching
    from planner.cli.show import show_report
    from planner.workflow.verifying import artifact_of, verify

    plan, artifact = artifact_of(existing(target), existing(output) if output else None)
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
