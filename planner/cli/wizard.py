"""``qplan wizard``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from planner.cli.options import existing, json_option, profile_option
from planner.core.errors import Exit, MissingDependency, UsageError

if TYPE_CHECKING:
    from planner.tui.state import State

LOCAL = ("127.0.0.1", "::1", "localhost")


@click.command("wizard")
@click.argument("model", required=False)
@profile_option
@click.option("--output", default=".", show_default=True, metavar="DIR", help="Where the artifact would be written.")
@click.option("--web", is_flag=True, help="Serve the wizard to a browser on this machine instead.")
@click.option("--host", default="127.0.0.1", show_default=True, help="With --web: the address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="With --web.")
@click.option("--allow-remote", is_flag=True, help="With --web: other machines may come; there is no password.")
@json_option
def command(
    model: str | None,
    profile: str | None,
    output: str,
    web: bool,
    host: str,
    port: int,
    allow_remote: bool,
    as_json: bool,
) -> int:
    """Go from this machine to a verified model, screen by screen.

    On leaving, the command lines that do the same are printed. Needs the extra: pip install 'qplan[tui]'.
    """
    if as_json:
        raise UsageError("the wizard is for a person", hint="`qplan recommend MODEL --json` answers a program")
    _check_installed("textual")
    if web:
        return _serve(model, profile, output, host, port, allow_remote)
    served = "TEXTUAL_DRIVER" in os.environ  # by --web: a browser is the terminal
    if not served and not (sys.stdin.isatty() and sys.stderr.isatty()):  # drawn on stderr; stdout is for command lines
        raise UsageError(
            "the wizard needs a terminal", hint="`qplan recommend MODEL` answers without one; --web serves a browser"
        )
    return _run(model, profile, output)


def _check_installed(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingDependency(
            f"the wizard needs a package that is not installed: {package.replace('_', '-')}",
            hint="`pip install 'qplan[tui]'`; every other verb works without it",
        )


def _run(model: str | None, profile: str | None, output: str) -> int:
    from planner.tui.app import Wizard
    from planner.tui.state import State

    folder = existing(output)
    left = Wizard(State(model_text=model or "", profile=profile, output=folder, plan_path=folder / "plan.json")).run()
    if left is not None:
        say_goodbye(left)
        if left.outcome is not None and not left.outcome.ok:
            return Exit.OUTSIDE
    return Exit.DONE


def say_goodbye(left: State) -> None:
    """What was made, and the command lines that do the same."""
    lines = left.command_lines()
    if left.outcome is not None:
        click.echo(f"report: {left.outcome.report_path}, as a page: {left.outcome.page_path}", err=True)
    if lines:
        click.echo("the same on the command line:", err=True)
        for line in lines:
            click.echo(line)


def _serve(model: str | None, profile: str | None, output: str, host: str, port: int, allow_remote: bool) -> int:
    if host not in LOCAL and not allow_remote:
        raise UsageError(
            f"the wizard would be open to other machines at {host}, and whoever comes may write files here",
            hint="--host 127.0.0.1 is for this machine; --allow-remote says that you mean it",
            code="remote-refused",
        )
    _check_installed("textual_serve")
    from planner.tui.web import serve

    arguments = [*([model] if model else []), *(["--profile", profile] if profile else []), "--output", output]
    click.echo(f"the wizard is at http://{host}:{port} until Ctrl-C", err=True)
    serve(arguments, host, port)
    return Exit.DONE
