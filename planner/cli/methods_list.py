"""``qplan methods``: the tables of methods, environments, runtimes and kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from planner.cli.options import json_option
from planner.cli.output import console, escape, print_json, table
from planner.core.errors import Exit

if TYPE_CHECKING:
    from rich.console import Console

    from planner.execute.environments import Status
    from planner.methods import MethodRow
    from planner.methods.quantizers import Way
    from planner.runtimes.kernels import Kernel, Runtime
    from planner.runtimes.service import Server


@click.command("list")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> int:
    """List the quantization methods, environments, formats, runtimes and kernels; with NAME one method in detail.

    A kernel is what multiplies the quantized weights. Its row says what it asks of the machine and the weights, for
    which version of the runtime that is true, and where it stands.
    """
    from planner import methods
    from planner.execute.environments import of_method
    from planner.runtimes import kernels
    from planner.workflow.environments import statuses

    rows = methods.rows() if name is None else (methods.row(name),)
    shown = tuple(row for row in kernels.kernels() if any(method.name in row.methods for method in rows))
    mine = {row.name for method in rows for row in of_method(method.name)}
    found = tuple(status for status in statuses() if name is None or status.name in mine)
    if as_json:
        print_json(_document(rows, shown, found))
        return Exit.DONE
    out = console()
    _methods(out, rows)
    _environments(out, found)
    if name is not None:
        _in_detail(out, rows[0], shown)
        return Exit.DONE
    _runtimes(out, kernels.runtimes())
    _kernels(out, shown)
    out.print("[dim]`qplan methods NAME` prints the limits, versions and sources of its kernels[/]")
    return Exit.DONE


def _document(rows: tuple[MethodRow, ...], shown: tuple[Kernel, ...], found: tuple[Status, ...]) -> dict[str, Any]:
    from planner import FORMAT_VERSION
    from planner.core.codec import encode
    from planner.execute.preflight import missing_packages
    from planner.methods import quantizers
    from planner.runtimes import kernels

    return {
        "format_version": FORMAT_VERSION,
        "methods": [{**encode(row), "missing_packages": list(missing_packages(row.name))} for row in rows],
        "environments": [encode(row) for row in found],
        "quantizers": [encode(row) for row in quantizers.quantizers()],
        "ways": [encode(way) for way in quantizers.ways() if way.method in {row.name for row in rows}],
        "runtimes": [encode(row) for row in kernels.runtimes()],
        "servers": [_server_document(row) for row in _servers()],
        "kernels": [encode(row) for row in shown],
    }


def _servers() -> tuple[Server, ...]:
    from planner.runtimes.service import servers

    return servers()


def _server_document(row: Server) -> dict[str, Any]:
    from planner.core.codec import encode
    from planner.workflow.server_programs import find

    kept = {key: value for key, value in encode(row).items() if key != "options"}
    return {**kept, "missing": list(find(row).lacking)}


def _methods(out: Console, rows: tuple[MethodRow, ...]) -> None:
    from planner.execute.preflight import missing_packages

    made = table("method", "what it is", "calibration text", "apply")
    for row in rows:
        missing = missing_packages(row.name)
        state = "planned and printed only" if not row.executable else "ready"
        made.add_row(row.name, row.summary, row.calibration_text, f"needs {', '.join(missing)}" if missing else state)
    out.print(made)


def _environments(out: Console, found: tuple[Status, ...]) -> None:
    """Where the quantizers of the methods are installed, or what would install them."""
    from planner.core.units import format_bytes
    from planner.execute.environments import row
    from planner.workflow.environments import offer

    if not found:
        return
    made = table("environment", "methods", "state", "disk>", "packages, or how to get it")
    for status in found:
        size = format_bytes(status.size_bytes) if status.size_bytes else ""
        versions = ", ".join(f"{name} {version}" for name, version in status.versions)
        state = "in this Python" if status.current else "installed" if status.installed else status.note or "-"
        if status.python is None:
            wanted = offer(status.name)
            size = format_bytes(wanted.disk_bytes) if wanted.disk_bytes else ""
            versions = f"`qplan methods install {status.name}`, {wanted.takes_time()}"
        made.add_row(status.name, ", ".join(row(status.name).methods), state, size, versions)
    out.print(made)


def _runtimes(out: Console, rows: tuple[Runtime, ...]) -> None:
    from planner.workflow.server_programs import find

    made = table("runtime", "formats it reads", "servers", "version")
    for row in rows:
        named = [server for server in _servers() if server.runtime == row.name]
        servers = [f"{server.name}{'' if find(server).lacking else ' (installed)'}" for server in named]
        made.add_row(row.name, ", ".join(row.formats), ", ".join(servers) or "-", row.version)
    out.print(made)


def _kernels(out: Console, rows: tuple[Kernel, ...]) -> None:
    made = table("kernel", "runtime", "methods", "types", "device", "speed")
    for row in rows:
        types, device = ", ".join(row.types) or "all", needs_of_device(row)
        made.add_row(row.id, row.runtime, ", ".join(row.methods), types, device, _speed(row))
    out.print(made)


def _speed(row: Kernel) -> str:
    return row.speed if row.predicted else f"{row.speed}, not planned"


def needs(row: Kernel) -> str:
    """The conditions of a kernel's row in words."""
    parts = [needs_of_device(row)]
    parts += [row.architecture] if row.architecture else []
    parts += [f"one of {', '.join(row.simd)}"] if row.simd else []
    parts += [f"on {row.os}"] if row.os else []
    parts += [f"types {', '.join(row.types)}"] if row.types else []
    parts += [f"groups {', '.join(map(str, row.group_sizes))}"] if row.group_sizes else []
    parts += [] if row.act_order else ["no act-order"]
    parts += ["no act-order with a split input"] if not row.act_order_sharded else []
    parts += ["symmetric"] if row.symmetric else []
    parts += [f"inputs % {row.in_multiple}"] if row.in_multiple > 1 else []
    parts += [f"outputs % {row.out_multiple}"] if row.out_multiple > 1 else []
    parts += ["no group over two GPUs"] if row.group_divides_shard else []
    return "; ".join(parts)


def needs_of_device(row: Kernel) -> str:
    """The device that a kernel runs on: ``nvidia 7.5+``."""
    device = row.vendor or row.backend or "any"
    only = f" {row.only_capability} only" if row.only_capability else ""
    return f"{device}{f' {row.min_capability}+' if row.min_capability else only}"


def _ways(out: Console, method: str) -> None:
    """The programs that make a method's artifacts, in the order in which they are taken."""
    from planner.methods import quantizers

    for way in quantizers.ways():
        if way.method != method:
            continue
        row = quantizers.quantizer(way.quantizer)
        out.print(f"[bold]{row.name}[/]  {row.title} {row.version} makes {way.format}".rstrip())
        out.print(f"  {escape(way.why)}")
        out.print(f"  takes: {escape(_taken(way))}")
        if way.trap:
            out.print(f"  known: {escape(way.trap)}")
        out.print(f"  [dim]{escape(row.source)} ({row.date})[/]\n", soft_wrap=True)


def _taken(way: Way) -> str:
    """The settings of a way in words."""
    parts = [f"types {', '.join(way.types)}"]
    parts += [f"groups {', '.join(map(str, way.group_sizes))}"] if way.group_sizes else []
    if way.method in ("awq", "gptq"):
        words: dict[tuple[bool, ...], str] = {(True,): "symmetric", (False,): "with zero points"}
        parts.append(words.get(way.symmetric, "symmetric or with zero points"))
    parts += ["act-order or none"] if way.act_order == (True, False) else []
    parts += [f"compute dtypes {', '.join(way.compute_dtypes)}"] if way.compute_dtypes else []
    return "; ".join(parts)


def _in_detail(out: Console, method: MethodRow, shown: tuple[Kernel, ...]) -> None:
    out.print(f"{escape(method.title)}, {method.licence or 'no licence of its own'} [dim]{escape(method.source)}[/]\n")
    _ways(out, method.name)
    for row in shown:
        out.print(f"[bold]{row.id}[/]  {row.kernel} in {row.runtime}, {_speed(row)}")
        out.print(f"  {escape(row.text)}")
        out.print(f"  needs: {escape(needs(row))}")
        if row.fix:
            out.print(f"  instead: {escape(row.fix)}")
        out.print(f"  [dim]{escape(row.version)}: {escape(row.source)} ({row.date})[/]\n", soft_wrap=True)
