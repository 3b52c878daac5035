"""A folder of wheels instead of a package index: small ones, and packages of this environment packed again."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import re
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

CHILD_NEEDS = ("pydantic", "psutil", "packaging")


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """A pure wheel of a few files."""
    info = f"{name}-{version}.dist-info"
    contents = {path: text.encode() for path, text in files.items()}
    contents[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    contents[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    return _packed(folder / f"{name}-{version}-py3-none-any.whl", info, contents)


def pack_installed(folder: Path, *names: str) -> dict[str, str]:
    """Wheels of packages of this environment and all that they need; name → version."""
    packed: dict[str, str] = {}
    todo = list(names)
    while todo:
        found = importlib.metadata.distribution(todo.pop())
        name = re.sub(r"[-.]+", "_", found.metadata["Name"])
        if name not in packed:
            packed[name] = found.version
            _pack(folder, name, found)
            needed = (Requirement(text) for text in found.requires or ())
            todo += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return packed


def _pack(folder: Path, name: str, found: importlib.metadata.Distribution) -> None:
    info = f"{name}-{found.version}.dist-info"
    tag = next(line.split()[1] for line in (found.read_text("WHEEL") or "").splitlines() if line.startswith("Tag:"))
    contents = {}
    for path in found.files or ():
        parts = path.parts
        if ".." in parts or "__pycache__" in parts or path.name in {"RECORD", "INSTALLER", "REQUESTED"}:
            continue
        inside = "/".join((info, *parts[1:]) if parts[0].endswith(".dist-info") else parts)
        contents[inside] = Path(str(path.locate())).read_bytes()
    _packed(folder / f"{name}-{found.version}-{tag}.whl", info, contents)


def _packed(path: Path, info: str, contents: dict[str, bytes]) -> Path:
    digests = {name: base64.urlsafe_b64encode(hashlib.sha256(b).digest()).rstrip(b"=") for name, b in contents.items()}
    record = [f"{name},sha256={digests[name].decode()},{len(b)}" for name, b in contents.items()]
    contents = {**contents, f"{info}/RECORD": "\n".join([*record, f"{info}/RECORD,,"]).encode()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as wheel:
        for name, content in contents.items():
            wheel.writestr(name, content)
    return path
