"""``qplan tune GGUF|MODEL``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from planner.cli.options import Finite, json_option
from planner.cli.output import console, escape, print_json, table
from planner.core.errors import Exit
from planner.core.tuned import COSTS, setting_line
from planner.core.units import format_rate

if TYPE_CHECKING:
    from planner.core.candidate import Placement
    from planner.workflow.tuning_result import Speed, Tried, TuneResult

COLUMNS = (
    "threads>",
    "micro batch>",
    "flash",
    "KV",
    "decode t/s>",
    "80 %>",
    "prefill t/s>",
    "80 %>",
    "slower>",
    "set aside>",
    "",
)
GIVE_WAY = ("80 %>", "set aside>")


@click.command("tune")
@click.argument("model")
@click.option("--type", "type_", metavar="TYPE", help="GGUF type of a model that is no file; default: recommended.")
@click.option(
    "--budget", type=Finite(5, 7200), default=120.0, show_default=True, metavar="SECONDS", help="Time to measure."
)
@click.option(
    "--objective",
    type=click.Choice(COSTS),
    default="balanced",
    show_default=True,
    help="Tokens per second of the answer, of the prompt, or a prompt with an answer of 128 tokens.",
)
@click.option("--depth", type=click.IntRange(0), default=0, show_default=True, help="Cached tokens while decoding.")
@click.option("--prompt-tokens", type=click.IntRange(64, 65536), default=512, show_default=True, help="Of the prompt.")
@click.option("--context", type=click.IntRange(1), help="Tokens of context that every setting must have room for.")
@click.option("--cpu-only", is_flag=True, help="Leave the GPUs alone.")
@click.option("--save/--no-save", default=True, show_default=True, help="Keep the result for later recommendations.")
@click.option("--forget", is_flag=True, help="Drop what was tuned for MODEL here, measure nothing.")
@json_option
def command(
    model: str,
    type_: str | None,
    budget: float,
    objective: str,
    depth: int,
    prompt_tokens: int,
    context: int | None,
    cpu_only: bool,
    save: bool,
    forget: bool,
    as_json: bool,
) -> int:
    """Search threads, micro-batch, flash attention, KV cache type and GPU layers of MODEL by measuring.

    MODEL is a GGUF file, or a name: then random weights in its shape are run. Settings are tried by turns, the better
    half of them longer, and so on. Says how much slower the recommended settings are than the best found; from then on
    the best are recommended here for this model.
    """
    if forget:
        return _forget(model, as_json)
    from planner.cli.apply import Watching
    from planner.workflow.tuning import TuneOptions, tune
    from planner.workflow.tuning_result import document

    options = TuneOptions(
        target=model,
        type=type_.upper() if type_ else None,
        budget_seconds=budget,
        objective=objective,
        depth=depth,
        prompt_tokens=prompt_tokens,
        context=context,
        cpu_only=cpu_only,
        save=save,
    )
    with Watching() as watcher:
        found = tune(options, watcher.measuring("tune"))
    print_json(document(found)) if as_json else _show(found)
    return Exit.DONE


def _forget(model: str, as_json: bool) -> int:
    from planner import FORMAT_VERSION
    from planner.workflow.tuning import forget

    count = forget(model)
    if as_json:
        print_json({"format_version": FORMAT_VERSION, "forgotten": count})
    else:
        click.echo(f"forgot {count} settings that were tuned here for {model}", err=True)
    return Exit.DONE


def _show(found: TuneResult) -> None:
    out = console()
    what = {"decode": "decode", "prefill": "prefill", "balanced": "a prompt and an answer"}[found.request.objective]
    out.print(f"[bold]{escape(found.model.name)} as {found.variant.type}[/], {escape(found.material)}, for {what}")
    with_layers = bool(found.recommended.setting.gpu_count)
    rows = table(*(["GPU layers>"] if with_layers else []), *COLUMNS, give_way=GIVE_WAY)
    for one in found.tried:
        if one.status == "alike":
            continue
        cells = [*([str(one.setting.gpu_layers)] if with_layers else []), *_cells(one, found)]
        rows.add_row(*cells, style="" if one.cost else "dim")
    out.print(rows)
    out.print("[dim]medians with the middle 80 % of the samples; set aside: samples that other programs disturbed[/]")
    out.print(f"best found:  {_words(found.best.setting)}")
    out.print(f"recommended: {_words(found.recommended.setting)}")
    out.print(f"[bold]{regret_line(found)}[/]")
    if found.kept is not None:
        out.print(
            f"kept for this machine: {_words(found.chosen.setting)}; `qplan recommend` and `plan` use it from now on"
        )
    for note in found.notes:
        out.print(f"[dim]note: {escape(note)}[/]")


def _words(setting: Placement) -> str:
    return setting_line(setting)


def regret_line(found: TuneResult) -> str:
    """What the recommended setting costs, in words."""
    regret = found.regret
    if regret is None:
        return "no regret can be told: the recommended setting or the best had no core to itself, or did not run"
    if found.best is found.recommended:
        return "regret 0 %: the recommended setting is the best found"
    numbers = f"{100 * regret.fraction:.1f} % ({100 * regret.low:.1f} to {100 * regret.high:.1f})"
    if regret.within_noise:
        return f"regret {numbers}: within the noise, so the recommended setting stays"
    return f"regret {numbers}: the recommended setting takes so much longer than the best found"


def _cells(one: Tried, found: TuneResult) -> list[str]:
    from planner.workflow.tuning_result import regret_of

    setting, regret = one.setting, regret_of(one, found.best)
    marks = [
        *(["recommended"] if one is found.recommended else []),
        *([one.note or one.status] if not one.cost else []),
    ]
    return [
        str(setting.threads or ""),
        str(setting.ubatch),
        "on" if setting.flash_attention else "off",
        setting.kv_type,
        *_spread(one.decode),
        *_spread(one.prefill),
        f"{100 * regret.fraction:+.1f} %" if regret else "",
        str(one.set_aside_count or ""),
        escape(", ".join(marks)),
    ]


def _spread(speed: Speed | None) -> tuple[str, str]:
    if speed is None:
        return "", ""
    return format_rate(speed.median), f"{format_rate(speed.low)}-{format_rate(speed.high)}"
