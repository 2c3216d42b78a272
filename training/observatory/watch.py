"""The live page: `living-moe watch` on loopback, and the same page as a Space.

Starlette on uvicorn, what Gradio itself stands on, without the 350 MB around it: the page is two files of ours, asks
nobody else for anything, and polls `/state`, which sends what changed (live.py). It only reads: no request names a
file, and the one that takes input (`/route`, a prompt) takes text of bounded length. On loopback other host names than
loopback's are refused, so that no web page can reach it through a name of its own that is made to point here.
"""

from __future__ import annotations

import html
import json
import os
import socket
import threading
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from living_moe.configuration.errors import ConfigurationError, LivingMoeError, RecordsError
from living_moe.training.observatory.lineage_page import lineage_page
from living_moe.training.observatory.live import Live
from living_moe.training.observatory.records import read_run
from living_moe.training.observatory.routing import PromptReader

PORT = 7860
LOOPBACK = "127.0.0.1"
#: Host names by which the page may be asked for on loopback.
LOOPBACK_HOSTS = (LOOPBACK, "localhost")
#: Bytes of a request with a prompt.
MOST_BYTES = 16_384
#: Requests at a time; more are sent away.
MOST_REQUESTS = 64
_PACKAGES = ("starlette", "uvicorn")
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'"
)


class Watch:
    """The page of a run or a checkpoint, ready to be served; the port is taken from here on.

    Args:
        path: Directory; that of a run may come later.
        title: Of the page; default the directory's name.
        port: To listen on; 0 takes a free one.
        public: Listen on every address and for every host name, as behind the proxy of a Space; else on loopback only.

    Raises:
        ConfigurationError: Starlette or uvicorn is not installed, or the port is taken.
        RecordsError: `path` is a file.
    """

    def __init__(self, path: str | Path, *, title: str | None = None, port: int = PORT, public: bool = False):
        missing = [name for name in _PACKAGES if find_spec(name) is None]
        if missing:
            raise ConfigurationError(
                f"the live page needs {' and '.join(missing)}, not installed here; run "
                f"`pip install 'living_moe[watch]'`."
            )
        import uvicorn

        if Path(path).is_file():
            raise RecordsError(f"{path} is a file; give the directory of a run (its --output-dir) or of a checkpoint.")
        self.socket = listen("0.0.0.0" if public else LOOPBACK, port)
        self.port: int = self.socket.getsockname()[1]
        self.url = f"http://{LOOPBACK}:{self.port}/"
        self.server = uvicorn.Server(
            uvicorn.Config(
                application(path, title=title, public=public),
                http="h11",
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                limit_concurrency=MOST_REQUESTS,
                timeout_graceful_shutdown=1,
            )
        )

    def run(self) -> None:
        """Serve until `stop`, or until the process is interrupted."""
        try:
            self.server.run(sockets=[self.socket])
        except KeyboardInterrupt:
            pass
        finally:
            self.socket.close()

    def stop(self) -> None:
        """End `run`, from another thread."""
        self.server.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on a port.

    Raises:
        ConfigurationError: The port is taken, or may not be used.
    """
    taken = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if os.name == "posix":  # elsewhere this would share a port that is in use
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, port))
        taken.listen(MOST_REQUESTS)
    except (OSError, OverflowError) as error:
        taken.close()
        raise ConfigurationError(
            f"cannot listen on port {port} of {host}: {error}; choose another with --port (0 takes a free one)."
        ) from error
    return taken


def application(path: str | Path, *, title: str | None = None, public: bool = False) -> Any:
    """The page as an ASGI application.

    Args:
        path: Directory of a run or a checkpoint.
        title: Of the page; default the directory's name.
        public: Answer to any host name, and in other sites' frames.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    live, prompts = Live(path), PromptReader(path)
    lineage = Lineage(path, live)
    room = files(__package__)
    name = html.escape(title or Path(path).resolve().name)
    page = Template(room.joinpath("watch_page.html").read_text(encoding="utf-8")).substitute(name=name)
    script = room.joinpath("watch_page.js").read_text(encoding="utf-8")

    def answer(content: str, kind: str, *, status: int = 200, policy: str = "", framed: str = "'none'") -> Response:
        policy = "; ".join(part for part in (policy, "" if public else f"frame-ancestors {framed}") if part)
        headers = {**_HEADERS, **({"Content-Security-Policy": policy} if policy else {})}
        return Response(content, status_code=status, media_type=kind, headers=headers)

    def plain(value: Any, status: int = 200) -> Response:
        return answer(json.dumps(value, allow_nan=False, separators=(",", ":")), "application/json", status=status)

    async def index(request: Request) -> Response:
        return answer(page, "text/html", policy=_PAGE_POLICY)

    async def code(request: Request) -> Response:
        return answer(script, "text/javascript")

    async def state(request: Request) -> Response:
        return plain(await run_in_threadpool(live.state, dict(request.query_params)))

    async def descent(request: Request) -> Response:
        try:
            return answer(await run_in_threadpool(lineage.page), "text/html", framed="'self'")
        except LivingMoeError as error:
            return answer(str(error), "text/plain", status=404, framed="'self'")

    async def route(request: Request) -> Response:
        # A form of another site cannot send this type without being asked first.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return plain({"error": "send a prompt as application/json."}, 415)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_BYTES:
                return plain({"error": f"a prompt may have at most {MOST_BYTES:,} bytes."}, 413)
        try:
            prompt = json.loads(body)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            return plain({"error": 'send {"prompt": "some text"}.'}, 400)
        try:
            return plain(await run_in_threadpool(prompts, prompt))
        except LivingMoeError as error:
            return plain({"error": str(error)}, 409)

    return Starlette(
        routes=[
            Route("/", index),
            Route("/watch.js", code),
            Route("/state", state),
            Route("/lineage", descent),
            Route("/route", route, methods=["POST"]),
        ],
        middleware=[
            Middleware(
                TrustedHostMiddleware, allowed_hosts=["*"] if public else list(LOOPBACK_HOSTS), www_redirect=False
            ),
            Middleware(GZipMiddleware, minimum_size=2000),
        ],
    )


class Lineage:
    """The lineage page of a run, built when it is asked for and something has happened since."""

    def __init__(self, path: str | Path, live: Live):
        self._path, self._live = path, live
        self._lock = threading.Lock()
        self._of: dict[str, str] = {}
        self._page = ""

    def page(self) -> str:
        """Raises `RecordsError` while there is no expert."""
        with self._lock:
            versions = self._live.state()["versions"]
            if versions != self._of or not self._page:
                # Records of its own: those of the live page go on changing.
                self._page = lineage_page(read_run(self._path))
                self._of = versions
            return self._page


def serve(
    path: str | Path,
    *,
    title: str | None = None,
    port: int = PORT,
    public: bool = False,
    announce: Callable[[str], None] | None = None,
) -> None:
    """Serve the page until interrupted; see `Watch`.

    Args:
        announce: Called with the page's address when it can be opened.
    """
    watch = Watch(path, title=title, port=port, public=public)
    if announce is not None:
        announce(watch.url)
    watch.run()


__all__ = ["LOOPBACK_HOSTS", "PORT", "Watch", "application", "serve"]
