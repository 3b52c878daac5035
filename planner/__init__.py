"""qplan: how to run a language model best on this machine, and then do it."""

from __future__ import annotations

__version__ = "0.1.0"
FORMAT_VERSION = "1.0"
"""Version of every JSON document qplan writes (plans, reports, ``--json`` output)."""
