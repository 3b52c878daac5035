"""The wizard in a browser: the same program, one process for each page that is open."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from textual_serve.server import Server


class LocalServer(Server):
    """textual-serve, but deaf to pages of other sites.

    A page from anywhere may open a web socket to this machine, and a name of anyone's may be made to point here (DNS
    rebinding). So the address asked for and the page that asks must be this server's own.
    """

    async def _make_app(self) -> web.Application:
        app = await super()._make_app()
        app.middlewares.append(own_pages_only(self.host, self.port))
        return app


def own_pages_only(host: str, port: int) -> Middleware:
    """A middleware that answers 403 to other names than ``host`` and to pages from elsewhere."""
    known = {f"{host}:{port}", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"}

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        everywhere = host in {"0.0.0.0", "::"}
        named = request.host if everywhere else None
        if request.host not in known | {named}:
            raise web.HTTPForbidden(text="this address is not the wizard's")
        if origin is not None and urlsplit(origin).netloc != request.host:
            raise web.HTTPForbidden(text="a page from elsewhere may not use the wizard")
        return await handler(request)

    return check


def serve(arguments: Sequence[str], host: str, port: int) -> None:
    """Serve ``qplan wizard`` with ``arguments`` until Ctrl-C."""
    command = shlex.join([sys.executable, "-m", "planner.cli", "wizard", *arguments])
    LocalServer(command, host=host, port=port, title="qplan").serve()
