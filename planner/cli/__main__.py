"""``python -m planner.cli`` is ``qplan``."""

from __future__ import annotations

from planner.cli import main

main()
