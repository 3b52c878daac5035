"""``qplan plan MODEL``."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from planner.cli.finetuning import finetune_options
from planner.cli.options import (
    Bytes,
    Finite,
    existing,
    json_option,
    matrix_file,
    profile_option,
    workload_options,
)
from planner.cli.output import print_json
from planner.core.errors import Exit, UsageError
from planner.core.workload import Workload

if TYPE_CHECKING:
    from planner.core.plan import Plan
    from planner.workflow.recommend import Recommendation


@click.command("plan")
@click.argument("model")
@click.option("-o", "--output", default="plan.json", show_default=True, metavar="FILE", help="The plan.")
@click.option("--target-size", type=Bytes(), metavar="SIZE", help="A mixture of types whose file has this size.")
@click.option("--target-bpw", type=Finite(0.5, 16), metavar="BITS", help="The same, in bits per weight of the file.")
@click.option("--fit-memory", type=Bytes(), metavar="SIZE", help="A mixture of types whose run takes this much memory.")
@click.option(
    "--calibration",
    metavar="FILE|DIR|hub:ORG/NAME",
    help="Text to calibrate with, or a dataset, hub:ORG/NAME[@REVISION][:SPLIT[:COLUMN]]; default: qplan's own.",
)
@click.option("--calibration-chunks", type=click.IntRange(1), help="Chunks of it to use; default: 128.")
@click.option("--calibration-tokens", type=click.IntRange(8), help="AWQ, GPTQ: tokens of a chunk; default: 512.")
@click.option(
    "--probes", type=click.IntRange(1), help="Parts of the model to probe for a mixture; default: 10 minutes'."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Draws the chunks.")
@profile_option
@click.option("--dataset", metavar="FILE", help="Finetune: .jsonl or text to train with; default: a smoke test.")
@workload_options
@finetune_options
@json_option
def command(model: str, output: str, profile: str | None, workload: Workload, as_json: bool, **wishes: Any) -> int:
    """Write the recommendation for MODEL as a plan that `qplan apply` carries out.

    A plan says what will be run on which machine from which files, and what the result should measure. It holds no
    command lines, and a changed plan is refused. `--types Q6_K` plans for a type of your own choice; `--target-size`,
    `--target-bpw` or `--fit-memory` for a mixture of types that fills what there is, the bits where they matter.
    """
    from planner.core.codec import encode
    from planner.execute.preflight import check_replaceable
    from planner.workflow.planning import conversion_note, save_plan
    from planner.workflow.recommend import recommend

    path = existing(output)
    check_replaceable(path, "content_sha256")
    answer = recommend(model, workload, profile=profile, output=path.absolute().parent, measure=True)
    made = _made(answer, wishes)
    if answer.finetuning is None and (needed := conversion_note(answer.model)):
        click.echo(f"note: {needed}", err=True)
    chosen = answer.decision.chosen
    ranks_first = chosen is not None and answer.finetuning is None
    if chosen is not None and ranks_first and chosen.variant.method != made.variant.method:
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


_FILLED = "note: the memory limit falls between two types, so a mixture fills it; `--types TYPE` plans a single type"


def _made(answer: Recommendation, wishes: dict[str, Any]) -> Plan:
    """The plan of the recommendation, or of the mixture that was asked for.

    Raises:
        UsageError: two things to calibrate with.
    """
    from planner.workflow.mixture import Wish, mixture, unasked
    from planner.workflow.planning import Measuring, make_plan

    text, matrix = wishes["calibration"], matrix_file()
    if text and matrix:
        raise UsageError("--calibration and --imatrix FILE exclude each other", hint="the file is calibrated already")
    wish = Wish(
        size_bytes=wishes["target_size"], bits_per_weight=wishes["target_bpw"], memory_bytes=wishes["fit_memory"]
    )
    if not wish.given and (automatic := unasked(answer)):
        wish = automatic
        click.echo(_FILLED, err=True)
    candidate, target = mixture(answer, wish) if wish.given else (None, None)
    measuring = Measuring(
        calibration=existing(text) if text else matrix,
        chunks=wishes["calibration_chunks"],
        chunk_tokens=wishes["calibration_tokens"],
        seed=wishes["seed"],
        probes=wishes["probes"],
        target_bytes=target,
        dataset=existing(wishes["dataset"]) if wishes["dataset"] else None,
    )
    return make_plan(answer, candidate, measuring)
