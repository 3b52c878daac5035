"""``qplan plan MODEL``."""

from __future__ import annotations

import shlex

import click

from planner.cli.options import existing, json_option, profile_option, workload_options
from planner.cli.output import print_json
from planner.core.errors import Exit
from planner.core.workload import Workload


@click.command("plan")
@click.argument("model")
@click.option("-o", "--output", default="plan.json", show_default=True, metavar="FILE", help="The plan.")
@profile_option
@workload_options
@json_option
def command(model: str, output: str, profile: str | None, workload: Workload, as_json: bool) -> int:
    """Write the recommendation for MODEL as a plan that `qplan apply` carries out.

    A plan says what will be run on which machine from which files, and what the result should measure. It holds no
    command lines, and a changed plan is refused. `--types Q6_K` plans for a type of your own choice.
    """
    from planner.core.codec import encode
    from planner.execute.preflight import check_replaceable
    from planner.workflow.planning import conversion_note, make_plan, save_plan
    from planner.workflow.recommend import recommend

    path = existing(output)
    check_replaceable(path, "content_sha256")
    answer = recommend(model, workload, profile=profile, output=path.absolute().parent, measure=True)
    made = make_plan(answer)
    if needed := conversion_note(answer.model):
        click.echo(f"note: {needed}", err=True)
    chosen = answer.decision.chosen
    if chosen is not None and chosen.variant.method != made.variant.method:
        note = f"{chosen.variant.label()} ranks first, but this version cannot carry {chosen.variant.method} out"
        click.echo(f"note: {note}; planned for {made.variant.label()}", err=True)
    save_plan(made, path)
    if as_json:
        print_json(encode(made))
    else:
        from planner.cli.show import show_plan

        show_plan(made)
    click.echo(f"wrote {path}; carry it out with `qplan apply {shlex.quote(str(path))}`", err=True)
    return Exit.DONE
