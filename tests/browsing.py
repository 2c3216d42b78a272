"""Pages in headless Chromium: what they look like, and whether they ask for anything they should not."""

from __future__ import annotations

import shutil
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SIZES = {"desktop": (1280, 860), "phone": (390, 844)}
#: WebGL in software, for machines without a GPU; a container has no user namespaces for the sandbox.
FLAGS = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


def opened(browser: Any, url: str, *, size: str = "desktop", scheme: str = "light") -> tuple[Any, list[str]]:
    """A page, ready, and what goes wrong on it: console messages, errors, requests to anywhere but its own server."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.set_default_timeout(120_000)
    page, wrong = context.new_page(), []
    own = ("data:", "blob:", "file:") if url.startswith("file:") else ("data:", "blob:", url)
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
    page.goto(url, timeout=120_000)
    page.wait_for_selector("body[data-ready=yes]")
    return page, wrong
