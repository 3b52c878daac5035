"""How values that cross a file or process boundary are read."""

STRICT = {"extra": "forbid"}
"""Pydantic's configuration: a key that nobody knows is an error."""
