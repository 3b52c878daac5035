"""``qplan methods``, and its own verbs ``install`` and ``remove``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from planner.cli import methods_list
from planner.cli.options import json_option
from planner.cli.output import console, print_json
from planner.core.errors import Exit
from planner.core.units import format_bytes

if TYPE_CHECKING:
    from planner.execute.installing import Tell
    from planner.workflow.environments import Offer, Status


class Methods(click.Group):
    """A group whose list needs no verb: ``qplan methods`` and ``qplan methods awq`` print it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; what names no verb is for the list."""
        first = next((arg for arg in args if not arg.startswith("-")), None)
        if first not in self.commands and not {"-h", "--help"} & set(args):
            args = [methods_list.command.name or "", *args]
        return super().parse_args(ctx, args)


@click.group("methods", cls=Methods, invoke_without_command=False)
def command() -> None:
    """List the quantization methods, or install what one needs.

    `qplan methods` lists all, `qplan methods NAME` one with its kernels. Quantizers whose dependencies do not go
    together are installed in environments of their own, which qplan makes and uses by itself.
    """


command.add_command(methods_list.command)


@command.command("install")
@click.argument("name", metavar="METHOD|ENVIRONMENT")
@click.option("--yes", is_flag=True, help="Agree beforehand.")
@click.option("--dry-run", is_flag=True, help="Say what it would take, and install nothing.")
@click.option("--installer", type=click.Choice(("uv", "pip")), help="Default: uv where it is there, else pip.")
@json_option
def install(name: str, yes: bool, dry_run: bool, installer: str | None, as_json: bool) -> int:
    """Install the environment of a method: size and time are said first.

    Indexes and folders of wheels that pip or uv are set to (pip.conf, PIP_*, UV_*) are used. torch is the build for
    this machine's GPU and driver, or the CPU's. What a killed installation left is made anew.
    """
    from planner.workflow import environments

    wanted = environments.offer(environments.named(name), installer=installer)
    there = environments.status(wanted.name)
    ready = there.current or (there.installed and not dry_run)
    if ready or dry_run:
        _say(there, wanted, as_json=as_json, ready=ready)
        return Exit.DONE
    environments.check_room(wanted)
    can_ask = sys.stdin.isatty() and not as_json
    environments.confirm(wanted, assume_yes=yes, ask=click.confirm if can_ask else None)
    show(wanted)
    done = environments.install(wanted, telling(wanted))
    _say(done, wanted, as_json=as_json, ready=True)
    return Exit.DONE


@command.command("remove")
@click.argument("name", metavar="METHOD|ENVIRONMENT")
@json_option
def remove(name: str, as_json: bool) -> int:
    """Remove the environment that qplan made for a method."""
    from planner import FORMAT_VERSION
    from planner.workflow import environments

    chosen = environments.named(name)
    freed = environments.remove(chosen)
    if as_json:
        print_json({"format_version": FORMAT_VERSION, "environment": chosen, "freed_bytes": freed})
    else:
        said = f"removed {chosen}: {format_bytes(freed)}" if freed is not None else f"there is no {chosen} to remove"
        click.echo(said, err=True)
    return Exit.DONE


def show(wanted: Offer) -> None:
    """What it takes, on stderr."""
    out = console(stderr=True)
    out.print(f"{wanted.title}: {wanted.summary}")
    out.print(f"  {wanted.package_count} pinned packages, torch for {wanted.build}, by {wanted.installer}")
    out.print(f"  {wanted.takes()}")
    if wanted.replaces:
        out.print(f"  replaces: {wanted.replaces}")
    out.print(f"  into {wanted.place}", soft_wrap=True)


def telling(wanted: Offer) -> Tell:
    """Progress on stderr: one line for each part."""

    def tell(what: str, fraction: float) -> None:
        if fraction < 1.0:
            click.echo(f"{wanted.title}: {what}", err=True)

    return tell


def _say(there: Status, wanted: Offer, *, as_json: bool, ready: bool) -> None:
    """The state, or what installing would take."""
    from planner import FORMAT_VERSION
    from planner.core.codec import encode

    if as_json:
        document: dict[str, Any] = {"format_version": FORMAT_VERSION, "environment": encode(there)}
        print_json(document | {"offer": encode(wanted)})
    elif not ready:
        show(wanted)
    else:
        versions = ", ".join(f"{name} {version}" for name, version in there.versions)
        size = f" ({format_bytes(there.size_bytes)})" if there.size_bytes and not there.current else ""
        click.echo(f"{there.title} is ready{size}: {versions}, {there.python}", err=True)
