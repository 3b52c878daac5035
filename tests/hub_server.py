"""A stand-in for the Hugging Face hub on 127.0.0.1: the endpoints huggingface_hub asks, and a log of bytes sent."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
CHUNK_BYTES = 1 << 16


@dataclass
class FakeHub:
    """Repositories are folders; ``gated`` ones need a token, ``ignores_ranges`` ones always send whole files."""

    folders: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    ignores_ranges: set[str] = field(default_factory=set)
    piece_seconds: float = 0.0
    """Pause after each piece of a file's body: a slow line."""
    breaks_after: int | None = None
    """Bytes of a body after which the connection is cut."""
    sent_bytes: Counter[str] = field(default_factory=Counter)
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    def start(self) -> ThreadingHTTPServer:
        hub = self

        class Handler(_Handler):
            fake = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeHub

    def log_message(self, *_: object) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if token := self.headers.get("Authorization"):
            self.fake.tokens.add(token)
        if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._model_info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3], body)
        else:
            self._error(404, "EntryNotFound")

    def _refused(self, repository: str, revision: str) -> bool:
        if repository not in self.fake.folders:
            self._error(401, "RepoNotFound")
        elif repository in self.fake.gated and not self.headers.get("Authorization"):
            self._error(401, "GatedRepo")
        elif revision not in ("main", "v1", COMMIT):
            self._error(404, "RevisionNotFound")
        else:
            return False
        return True

    def _model_info(self, repository: str, revision: str) -> None:
        gated_listing = repository in self.fake.gated
        if not gated_listing and self._refused(repository, revision):
            return
        siblings = []
        for path in sorted(self.fake.folders[repository].rglob("*")):
            if path.is_file():
                entry = {"rfilename": str(path.relative_to(self.fake.folders[repository])), "size": path.stat().st_size}
                if path.suffix in LFS_SUFFIXES:
                    entry["lfs"] = {"sha256": sha256(path), "size": path.stat().st_size, "pointerSize": 130}
                siblings.append(entry)
        info = {"id": repository, "modelId": repository, "sha": COMMIT, "private": False, "gated": False}
        self._send(200, json.dumps({**info, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}).encode())

    def _file(self, repository: str, revision: str, name: str, body: bool) -> None:
        if self._refused(repository, revision):
            return
        path = self.fake.folders[repository] / name
        if not path.is_file():
            self._error(404, "EntryNotFound")
            return
        start, end, status = 0, path.stat().st_size - 1, 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted and repository not in self.fake.ignores_ranges:
            start, end, status = int(wanted[1]), min(int(wanted[2] or end), end), 206
        headers = {"ETag": f'"{sha256(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{end}/{path.stat().st_size}"
        self._head(status, end - start + 1, headers)
        if body:
            self._pour(path, name, start, end - start + 1)

    def _pour(self, path: Path, name: str, start: int, left: int) -> None:
        with path.open("rb") as stream:
            stream.seek(start)
            last = max(left - (self.fake.breaks_after or left), 0)
            while left > last:
                piece = stream.read(min(CHUNK_BYTES, left))
                try:
                    self.wfile.write(piece)
                except OSError:  # the client has what it wanted
                    self.close_connection = True
                    return
                self.fake.sent_bytes[name] += len(piece)
                left -= len(piece)
                time.sleep(self.fake.piece_seconds)
        if left:
            self.close_connection = True

    def _error(self, status: int, code: str) -> None:
        self._head(status, 0, {"X-Error-Code": code, "X-Error-Message": f"{code} says the stand-in"})

    def _send(self, status: int, content: bytes) -> None:
        self._head(status, len(content), {"Content-Type": "application/json"})
        self.wfile.write(content)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(key, value)
        self.end_headers()
