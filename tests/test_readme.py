"""What the README promises is there."""

from __future__ import annotations

import re
from pathlib import Path

from planner.cli import VERBS
from planner.models import catalog
from planner.probe import profile_names

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_verb_is_in_the_readme() -> None:
    assert all(re.search(rf"^  {verb} ", TEXT, re.MULTILINE) for verb in VERBS)


def test_the_counts_in_the_readme_are_true() -> None:
    models = re.search(r"`qplan models`: (\d+) of them", TEXT)
    profiles = re.search(r"one of (\d+) captured machines", TEXT)
    assert models and int(models[1]) == len(catalog.names())
    assert profiles and int(profiles[1]) == len(profile_names())


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
