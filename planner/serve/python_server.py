"""``python -m planner.serve.python_server``: llama-cpp-python's server with what its command line cannot say.

All options of ``python -m llama_cpp.server`` are its own. Added are two of llama.cpp's programs: ``--no-repack``,
without which llama.cpp faults on machines that announce AMX and refuse it, and ``--n-cpu-moe N``. Sliding-window caches
are not kept whole, as in llama.cpp's programs; the library's default is otherwise.

It runs only in a child process: it changes the library's defaults, and ends when its standard input closes.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from planner.verify.native import Offload, set_offload

_kept: list[Any] = []
"""What llama.cpp borrows for as long as the model lives."""


def main(arguments: Sequence[str]) -> None:
    """Start the server; returns when it is asked to end."""
    own, rest = parse(arguments)
    threading.Thread(target=end_with_parent, daemon=True).start()
    import llama_cpp
    from llama_cpp.server import __main__ as served
    from llama_cpp.server.settings import Settings

    forget_environment(os.environ, (*Settings.model_fields, "config_file"))
    set_defaults(llama_cpp.llama_cpp, own.no_repack, own.n_cpu_moe)
    sys.argv = ["llama_cpp.server", *rest]
    served.main()  # type: ignore[no-untyped-call]


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The two options of this module, and those that are llama_cpp.server's."""
    parser = argparse.ArgumentParser(prog="python -m planner.serve.python_server", add_help=False, allow_abbrev=False)
    parser.add_argument("--no-repack", action="store_true")
    parser.add_argument("--n-cpu-moe", type=int, default=0)
    return parser.parse_known_args(list(arguments))


def forget_environment(environment: Any, names: Sequence[str]) -> None:
    """Drop variables that llama_cpp.server would take for settings: ``HOST`` even beats ``--host``."""
    for name in names:
        for spelling in (name, name.upper()):
            environment.pop(spelling, None)


def set_defaults(library: Any, no_repack: bool, cpu_expert_layers: int) -> None:
    """Change what a model and a context are opened with unless they are told otherwise."""
    model_defaults: Callable[[], Any] = library.llama_model_default_params
    context_defaults: Callable[[], Any] = library.llama_context_default_params

    def model_parameters() -> Any:
        parameters = model_defaults()
        parameters.use_extra_bufts = not no_repack
        if cpu_expert_layers:
            _kept.extend(set_offload(parameters, Offload(cpu_expert_layers=cpu_expert_layers)))
        return parameters

    def context_parameters() -> Any:
        parameters = context_defaults()
        parameters.swa_full = False
        return parameters

    library.llama_model_default_params = model_parameters
    library.llama_context_default_params = context_parameters


def end_with_parent() -> None:
    """Wait until standard input closes, then end: whoever started this is gone."""
    try:
        while sys.stdin.buffer.read(1 << 16):
            continue
    finally:
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
