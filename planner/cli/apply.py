"""``qplan apply PLAN``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from planner.cli.options import Finite, existing, json_option
from planner.cli.output import console, print_json
from planner.core.errors import Exit
from planner.core.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from planner.core.plan import Step
    from planner.execute.receipts import Receipt
    from planner.workflow.pace import Pace


@click.command("apply")
@click.argument("plan")
@click.option("--output", default=".", show_default=True, metavar="DIR", help="Where the artifact is written.")
@click.option("--yes", is_flag=True, help="Agree beforehand to a download and to what must be installed.")
@click.option("--keep-intermediate", is_flag=True, help="Keep the model in 16 bits, as a file.")
@click.option("--text", metavar="FILE", help="Held-out text for perplexity; default: the one that comes with qplan.")
@click.option("--seconds", type=Finite(5), default=240.0, show_default=True, help="Time to measure.")
@click.option("--llama-cpp", metavar="DIR", envvar="LLAMA_CPP_DIR", help="A llama.cpp checkout, for its converter.")
@json_option
def command(
    plan: str,
    output: str,
    yes: bool,
    keep_intermediate: bool,
    text: str | None,
    seconds: float,
    llama_cpp: str | None,
    as_json: bool,
) -> int:
    """Carry PLAN out, measure the result and print predicted beside measured.

    An interrupted apply goes on where it stopped, and one that is done says so. Exit code 5: the measurement is
    outside of what the plan expects.
    """
    from planner.cli.methods import telling
    from planner.cli.show import show_report
    from planner.workflow.applying import ApplyOptions, apply
    from planner.workflow.planning import load_plan

    options = ApplyOptions(
        output=existing(output),
        assume_yes=yes,
        confirm=click.confirm if sys.stdin.isatty() and not as_json else None,
        keep_intermediate=keep_intermediate,
        installing=telling,
        budget_seconds=seconds,
        text=existing(text) if text else None,
        llama_cpp_directory=llama_cpp,
    )
    with Watching() as watcher:
        outcome = apply(load_plan(existing(plan)), options, watcher)
    if outcome.nothing_to_do:
        click.echo("nothing to do: the plan is applied and its artifact is unchanged", err=True)
    if as_json:
        print_json(outcome.report)
    else:
        show_report(outcome.report)
        click.echo(f"report: {outcome.report_path}, as a page: {outcome.page_path}", err=True)
    return Exit.DONE if outcome.ok else Exit.OUTSIDE


class Watching:
    """Progress on stderr: bars on a terminal, a line per step elsewhere."""

    def __init__(self) -> None:
        self._bars: Bars | None = None

    def __enter__(self) -> Watching:
        err = console(stderr=True)
        if err.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bars = Progress(*columns, console=err, transient=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def downloading(self, what: str) -> Callable[..., None]:
        """A model is fetched from the hub."""
        report, there = self._task(f"download {what}"), False

        def tell(done: float, total: float) -> None:
            nonlocal there
            report(done, total)
            if done >= total and not there:
                there = True
                self._say(f"download {what}: {format_bytes(total)} are there")

        return tell

    def started(self, step: Step) -> Callable[..., None]:
        """A step begins."""
        return self._task(f"{step.name} → {step.output}")

    def told(self, text: str) -> None:
        """What an interrupted run left, and what is done with it."""
        self._say(text)

    def finished(self, step: Step, receipt: Receipt, *, reused: bool) -> None:
        """A step is done."""
        how = "is there already" if reused else f"in {format_seconds(receipt.seconds)}"
        self._say(f"{step.name}: {receipt.output} ({format_bytes(receipt.size_bytes)}) {how}")

    def measuring(self, title: str = "measure") -> Callable[[str, float], None]:
        """A measurement begins."""
        report = self._task(title)
        bars = self._bars
        task = bars.task_ids[-1] if bars is not None else None

        def tell(what: str, fraction: float) -> None:
            report(fraction, 1.0)
            if bars is not None and task is not None:
                bars.update(task, description=f"{title}: {what}")

        return tell

    def _task(self, description: str) -> Callable[..., None]:
        from planner.workflow.pace import Pace

        pace = Pace()
        if self._bars is None:
            self._say(description)
            return lambda done, total: self._now_and_then(description, pace, done, total)
        self._bars.start()  # not before: it would take a question for markup
        for done in self._bars.task_ids:  # one bar at a time; a finished step has its line above
            self._bars.update(done, visible=False)
        bars, task = self._bars, self._bars.add_task(description, total=None, rate="")

        def tell(done: float, total: float) -> None:
            pace.see(done, total)
            bars.update(task, completed=done, total=total or None, rate=pace.words())

        return tell

    def _now_and_then(self, description: str, pace: Pace, done: float, total: float) -> None:
        """A line every half minute, where no bar can be drawn."""
        pace.see(done, total)
        if total and pace.is_due():
            self._say(f"{description}: {pace.line()}")

    def _say(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text)
        else:
            click.echo(text, err=True)
