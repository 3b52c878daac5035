"""``qplan serve PLAN|ARTIFACT``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from planner.cli.options import Finite, GpuLayers, existing, json_option
from planner.core.errors import Exit, UsageError
from planner.core.workload import KV_TYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    from planner.serve.run import Running
    from planner.workflow.serve_target import Options
    from planner.workflow.serving import Prepared

FORMS = ("command", "modelfile", "kubernetes", "docker", "python")
SERVERS = ("llama-server", "llama-cpp-python", "vllm", "tgi", "transformers")


@click.command("serve")
@click.argument("target", metavar="PLAN|REPORT|RUN|ARTIFACT")
@click.option("--print", "form", type=click.Choice(FORMS), help="Print how to serve it, and start nothing.")
@click.option("--server", type=click.Choice(SERVERS), help="Default: the first of its runtime's that is installed.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: a free one.")
@click.option("--output", metavar="DIR", help="Where a plan's artifact lies; default: beside the plan.")
@click.option("--context", type=click.IntRange(1), help="Tokens per sequence; default: the plan's.")
@click.option("--parallel", "sequences", type=click.IntRange(1), help="Sequences at once; default: the plan's.")
@click.option("--gpu-layers", type=GpuLayers(), help="Layers on the GPU; default: the plan's.")
@click.option("--kv-type", type=click.Choice(KV_TYPES), help="KV cache type; default: the plan's.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default: the plan's.")
@click.option("--ubatch", type=click.IntRange(1), help="Tokens of one step of prefill; default: the plan's.")
@click.option("--flash-attention", type=click.Choice(("on", "off")), help="Default: the plan's.")
@click.option("--tensor-parallel", type=click.IntRange(1), help="GPUs that vLLM or TGI split each layer over.")
@click.option("--chat-template", metavar="FILE", help="A Jinja file instead of the model's own template.")
@click.option(
    "--repack/--no-repack", default=None, help="llama.cpp's CPU-specific weights; default: unless they crash."
)
@click.option("--timeout", type=Finite(1), default=1800.0, show_default=True, help="Seconds to wait for an answer.")
@json_option
def command(target: str, form: str | None, server: str | None, timeout: float, as_json: bool, **given: Any) -> int:
    """Start the right server for a plan, a report, the folder of a run, a GGUF file or a checkpoint, with the plan's
    settings.

    It prints the URL once the server answers, and Ctrl-C ends both (exit code 130). Nothing that a plan says is run:
    the program and its options are qplan's.
    """
    from planner.workflow.finetuning import adapter_commands
    from planner.workflow.serving import prepare, print_text, start

    adapter = adapter_commands(existing(target), existing(given["output"]) if given["output"] else None)
    if adapter is not None:
        return _adapter(adapter, form, as_json)
    prepared = prepare(existing(target), _options(server, given), to_run=form is None)
    for note in prepared.notes:
        click.echo(f"note: {note}", err=True)
    if form is not None:
        text = print_text(prepared, form, server)
        click.echo(json.dumps(_printed(prepared, form, text)) if as_json else text)
        return Exit.DONE
    click.echo(f"starting {prepared.server.name} with {prepared.service.target}", err=True)
    start(prepared, _announce(prepared, as_json), lambda note: click.echo(f"note: {note}", err=True), timeout)
    click.echo("stopped", err=True)
    return Exit.DONE


def _adapter(commands: dict[str, str], form: str | None, as_json: bool) -> int:
    """Print how a fine-tuned adapter is used.

    Raises:
        UsageError: it was to be started.
    """
    if form is None:
        raise UsageError(
            "an adapter is served beside its model, which qplan does not start",
            hint="`--print command` shows how vLLM, transformers and llama.cpp use it, and how to merge it",
            code="adapter",
        )
    chosen = {"python": ("transformers", "merge"), "docker": ("vllm",), "kubernetes": ("vllm",), "modelfile": ("gguf",)}
    kept = {name: text for name, text in commands.items() if name in chosen.get(form, tuple(commands))}
    if as_json:
        from planner import FORMAT_VERSION

        click.echo(json.dumps({"format_version": FORMAT_VERSION, "form": form, "commands": kept}))
        return Exit.DONE
    for name, text in kept.items():
        click.echo(f"# {name}\n{text}\n")
    return Exit.DONE


def _options(server: str | None, given: dict[str, Any]) -> Options:
    from planner.workflow.serve_target import Options

    paths = {name: existing(given[name]) if given[name] else None for name in ("output", "chat_template")}
    attention = given.pop("flash_attention")
    flash_attention = None if attention is None else attention == "on"
    return Options(server=server, flash_attention=flash_attention, **{**given, **paths})


def _printed(prepared: Prepared, form: str, text: str) -> dict[str, Any]:
    from planner import FORMAT_VERSION

    argv = {"argv": list(prepared.command.argv)} if form == "command" else {}
    named = {"server": prepared.server.name, "version": prepared.server.version}
    return {
        "format_version": FORMAT_VERSION,
        "form": form,
        **named,
        "text": text,
        **argv,
        "notes": list(prepared.notes),
    }


def _announce(prepared: Prepared, as_json: bool) -> Callable[[Running], None]:
    def announce(running: Running) -> None:
        from planner import FORMAT_VERSION

        if as_json:
            document = {"format_version": FORMAT_VERSION, "url": f"{running.url}/v1", "server": prepared.server.name}
            more = {"model": prepared.model, "pid": running.pid, "log": str(running.log)}
            click.echo(json.dumps({**document, **more}))
            return
        click.echo(f"{running.url}/v1")
        click.echo(f"{prepared.model} answers there as OpenAI's API does; Ctrl-C ends it", err=True)
        click.echo(f"log: {running.log}", err=True)

    return announce
