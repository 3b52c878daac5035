"""qplan and nothing beside it, for children in another environment.

An installed qplan lies in a folder together with the packages of its own environment; were that folder on the path of
another interpreter, those would be found before its own. This folder holds this file alone, which stands for qplan.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[3])]
exec(compile(Path(__path__[0], "__init__.py").read_text("utf-8"), f"{__path__[0]}/__init__.py", "exec"))
