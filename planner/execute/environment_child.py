"""``python -m planner.execute.environment_child``: whether an environment is whole, asked of its own interpreter."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import Any

from planner.core.errors import ExecutionFailed
from planner.execute.process import Progress, serve


def work(request: dict[str, Any], _progress: Progress) -> dict[str, Any]:
    """Import the modules, and qplan's own that a step needs; the answer holds all packages and their versions."""
    for module in (*request["modules"], "planner.execute.child", "planner.execute.resident", "psutil"):
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - whatever a package fails with when it is imported
            raise ExecutionFailed(f"{module} cannot be imported", numbers=f"{type(error).__name__}: {error}") from None
    from packaging.utils import canonicalize_name

    found = {canonicalize_name(package.metadata["Name"]): package.version for package in _packages()}
    torch = sys.modules.get("torch")
    return {
        "versions": found,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "cuda": str(torch.version.cuda) if torch is not None and torch.version.cuda else None,
    }


def _packages() -> list[importlib.metadata.Distribution]:
    return [package for package in importlib.metadata.distributions() if package.metadata["Name"]]


if __name__ == "__main__":
    raise SystemExit(serve(work))
