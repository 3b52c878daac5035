"""The command line: one file per verb, which prints and decides nothing.

stdout is the answer, stderr everything else. ``--help`` imports no verb but the one asked for.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from collections.abc import Sequence

import click

from planner import FORMAT_VERSION, __version__
from planner.core.errors import Exit, QplanError, UsageError

VERBS: dict[str, tuple[str, str]] = {
    "recommend": ("recommend", "say how to run a model best on this machine"),
    "frontier": ("frontier", "draw size, quality and speed of every way to run a model"),
    "estimate": ("estimate", "size, memory, speed and quality of one way to run a model, or of many"),
    "explain": ("explain", "print the arithmetic behind an estimate, term by term"),
    "plan": ("plan", "write the recommendation as a plan"),
    "show": ("show", "print a plan or a report for a person"),
    "check": ("check", "check that a plan can be applied here and now"),
    "apply": ("apply", "carry a plan out and measure the result"),
    "verify": ("verify", "measure an artifact again"),
    "quality": ("quality", "measure what an artifact lost against its 16-bit model"),
    "quantize": ("quantize", "make GGUF files of a checkpoint in one pass, several types from one read"),
    "imatrix": ("imatrix", "compute an importance matrix of a model"),
    "report": ("report", "write the report of a run as one HTML file"),
    "compare": ("compare", "put several runs side by side"),
    "serve": ("serve", "start the right server with a plan's settings, or print how"),
    "wizard": ("wizard", "go from this machine to a verified model, screen by screen"),
    "calibrate": ("calibrate", "measure how fast this machine is, for all later estimates"),
    "tune": ("tune", "search the best settings of a model by measuring"),
    "probe": ("probe", "show what this machine has"),
    "models": ("models", "list the models known by name, or show one"),
    "methods": ("methods", "list the quantization methods"),
    "profiles": ("profiles", "list the captured machines"),
    "measurements": ("measurements", "list, share, import and compare what was measured"),
    "doctor": ("doctor", "check this installation"),
}


class Verbs(click.Group):
    """A group that imports a verb's module when it is called, and none for ``--help``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Verbs in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command, imported now."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"planner.cli.{VERBS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in VERBS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest verb in the error."""
        if args and args[0] not in VERBS:
            import difflib

            near = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " See `qplan --help`."
            raise click.UsageError(f"There is no command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.command(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "QPLAN"},
    epilog="`qplan recommend llama-2-13b` is a good start.",
)
@click.version_option(__version__, prog_name="qplan")
def cli() -> None:
    """How to run a language model best on this machine, and then do it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code of ``planner.core.errors.Exit``."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # JSON is UTF-8 whatever the locale; for a person, what the terminal cannot show is escaped.
            utf8 = stream is sys.stdout and bool({"--json", "--batch"} & set(arguments))
            stream.reconfigure(encoding="utf-8" if utf8 else None, errors="backslashreplace")
    code = run(arguments)
    # CPython notes a Ctrl-C that falls into a string being executed, as dataclasses do when they are imported, and then
    # dies of SIGINT under `python -m`, whatever the exit code; executing another string takes the note back.
    exec("")
    sys.exit(code)


def default_arguments() -> list[str]:
    """What `qplan` alone does: on a terminal the wizard, where it is installed; else the help."""
    import importlib.util

    on_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))
    return ["wizard"] if on_terminal and importlib.util.find_spec("textual") else []


def run(arguments: Sequence[str]) -> int:
    """Run one command; the exit code."""
    as_json = "--json" in arguments
    try:
        result = cli.main(args=list(arguments) or default_arguments(), standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        return int(result) if isinstance(result, int) else Exit.DONE
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show(sys.stderr)
        if as_json:
            print_error(QplanError(error.format_message(), code=UsageError.default_code))
        return Exit.USAGE
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        if as_json:
            print_error(QplanError("interrupted", code="interrupted"))
        return Exit.INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # The reader went away (`qplan models | head`), whereupon rich exits: nothing is wrong and nobody is there.
        _discard_output()
        return Exit.DONE
    except QplanError as error:
        return report_error(error, as_json=as_json)
    except OSError as error:
        if os.environ.get("QPLAN_DEBUG"):
            raise
        return _refused(error)
    except Exception as error:
        if os.environ.get("QPLAN_DEBUG"):
            raise
        return report_error(
            QplanError(
                f"unexpected {type(error).__name__}: {error}",
                hint="this is a bug in qplan; QPLAN_DEBUG=1 prints the traceback for a report",
                code="internal",
            ),
            as_json=as_json,
        )


def _discard_output() -> None:
    """Send what stdout still holds nowhere, so that the interpreter does not fail on it when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refused(error: OSError) -> int:
    """The system refused something that no check foresaw, most likely to take the answer: a full disk behind stdout."""
    _discard_output()
    named = f" {error.filename}" if error.filename else ""
    return report_error(
        QplanError(
            f"the system refused{named}: {error.strerror or error}",
            hint="make room or choose another place; QPLAN_DEBUG=1 prints the traceback",
            code="system",
        ),
        as_json=False,
    )


def report_error(error: QplanError, *, as_json: bool) -> int:
    """Print an error for a person on stderr, and as a document on stdout where JSON was asked for."""
    click.echo(f"{click.style('error:', fg='red', bold=True)} {error.what} [{error.code}]", err=True)
    for line in error.numbers.splitlines():
        click.echo(f"  {line}", err=True)
    if error.hint:
        click.echo(f"{click.style('hint:', fg='cyan')} {error.hint}", err=True)
    if as_json:
        print_error(error)
    return error.exit_code


def print_error(error: QplanError) -> None:
    """An error as the JSON document on stdout."""
    body = {"code": error.code, "message": error.what, "numbers": error.numbers, "hint": error.hint}
    click.echo(json.dumps({"format_version": FORMAT_VERSION, "error": body}))
