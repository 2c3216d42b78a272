"""The live page: what its server answers and refuses, and the page itself in headless Chromium while a model trains."""

import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import SIZES, opened
from factories import save_with_words
from lives import build, busy_model
from synthetic_run import write_synthetic_run

from living_moe.cli import main
from living_moe.configuration.errors import ConfigurationError, RecordsError
from living_moe.training.observatory import watch as module
from living_moe.training.observatory.recorder import Recorder
from living_moe.training.reporting import JsonLog, event_line

pytest.importorskip("starlette", reason="the extra `watch` is not installed")
pytest.importorskip("uvicorn", reason="the extra `watch` is not installed")

Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves a directory and returns the page's address."""
    running: list[tuple[module.Watch, threading.Thread]] = []

    def start(path: Path, **options: Any) -> str:
        watch = module.Watch(path, port=0, **options)
        thread = threading.Thread(target=watch.run)
        thread.start()
        running.append((watch, thread))
        return watch.url

    yield start
    for watch, thread in running:
        watch.stop()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a saved model, as a crash leaves it."""
    directory = tmp_path_factory.mktemp("runs") / "a <b> & c"
    write_synthetic_run(directory, layers=2, founders=8, events=90, most=20, steps=800, every=50)
    with (directory / "lineage.jsonl").open("a") as file:
        file.write('{"kind": "split", "step": 8')
    save_with_words(busy_model(), directory / "final")
    return directory


def ask(
    url: str, data: bytes | None = None, *, kind: str = "application/json", host: str | None = None
) -> tuple[int, bytes, Any]:
    """Status, body and headers."""
    headers = {**({"Content-Type": kind} if data is not None else {}), **({"Host": host} if host else {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as reply:
            return reply.status, reply.read(), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


# -- the server --------------------------------------------------------------------------------------------------------


def test_the_server_tells_a_run_s_state_page_and_lineage(run: Path, serve: Serve) -> None:
    url = serve(run)
    status, page, headers = ask(url)
    assert status == 200 and b"<h1>a &lt;b&gt; &amp; c</h1>" in page
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
    state = json.loads(ask(url + "state")[1])
    assert state["status"]["events"] == 90 and "cut off in line 91" in state["status"]["notes"][0]
    query = "&".join(f"{name}={version}" for name, version in state["versions"].items())
    assert set(json.loads(ask(f"{url}state?{query}")[1])) == {"status", "versions"}
    status, lineage, headers = ask(url + "lineage")
    assert status == 200 and b"Lineage of a &lt;b&gt; &amp; c" in lineage
    assert headers["Content-Security-Policy"] == "frame-ancestors 'self'"


def test_the_server_answers_on_loopback_to_loopback_s_names_only(run: Path, serve: Serve) -> None:
    url = serve(run)
    watch = module.Watch(run, port=0)
    assert watch.socket.getsockname()[0] == "127.0.0.1"
    watch.socket.close()
    port = url.rstrip("/").rpartition(":")[2]
    for host, status in (("127.0.0.1", 200), (f"localhost:{port}", 200), ("evil.example", 400), (f"evil:{port}", 400)):
        assert ask(url, host=host)[0] == status
        assert ask(url + "state", host=host)[0] == status
        assert ask(url + "route", b'{"prompt": "w1"}', host=host)[0] == status


def test_in_a_space_it_answers_to_any_name_and_in_other_sites_frames(run: Path, serve: Serve) -> None:
    status, page, headers = ask(serve(run, public=True, title="A Space"), host="someone-name.hf.space")
    assert status == 200 and b"<h1>A Space</h1>" in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "frame-ancestors" not in headers["Content-Security-Policy"]


def test_no_address_names_a_file_and_nothing_can_be_written(run: Path, serve: Serve) -> None:
    url = serve(run)
    for path in (
        "run.json",
        "../run.json",
        "%2e%2e/run.json",
        "final/config.json",
        "etc/passwd",
        "lineage/../run.json",
    ):
        assert ask(url + path)[0] == 404
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for path in ("", "state", "lineage"):
        assert ask(url + path, b"{}")[0] == 405
    assert ask(url + "route", b'{"prompt": "w1 w2"}')[0] == 200
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("data", "kind", "status", "message"),
    [
        (b'{"prompt": "w1"}', "text/plain", 415, "application/json"),
        (b'{"prompt": "' + b"w" * 20_000 + b'"}', "application/json", 413, "at most 16,384 bytes"),
        (b'{"prompt": 3}', "application/json", 400, "send"),
        (b"[]", "application/json", 400, "send"),
        (b"\xff{", "application/json", 400, "send"),
        (b'{"prompt": ""}', "application/json", 409, "no token"),
    ],
)
def test_what_is_no_prompt_is_refused(
    run: Path, serve: Serve, data: bytes, kind: str, status: int, message: str
) -> None:
    found, body, _ = ask(serve(run) + "route", data, kind=kind)
    assert found == status and message in json.loads(body)["error"]


def test_a_run_that_does_not_exist_yet_is_waited_for(tmp_path: Path, serve: Serve) -> None:
    url = serve(tmp_path / "later")
    assert json.loads(ask(url + "state")[1])["status"]["state"] == "waiting"
    assert ask(url + "lineage")[0] == 404
    status, body, _ = ask(url + "route", b'{"prompt": "w1"}')
    assert status == 409 and "has no saved model yet" in json.loads(body)["error"]


def test_what_keeps_the_page_from_being_served_is_one_clear_line(
    run: Path, tmp_path: Path, serve: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = serve(run).rstrip("/").rpartition(":")[2]
    assert main(["watch", str(run), "--port", port]) == 1
    error = capsys.readouterr().err
    assert f"cannot listen on port {port}" in error and "--port" in error and len(error.splitlines()) == 1
    with pytest.raises(ConfigurationError, match="port 70000"):
        module.Watch(run, port=70_000)
    (tmp_path / "file").touch()
    with pytest.raises(RecordsError, match="is a file"):
        module.Watch(tmp_path / "file", port=0)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'living_moe\[watch\]'"):
        module.Watch(run, port=0)


# -- the page in a browser ---------------------------------------------------------------------------------------------


def test_the_page_opens_clean_at_every_width_and_in_both_schemes(
    run: Path, serve: Serve, browser: Any, artefacts: Path
) -> None:
    url = serve(run)
    for size in SIZES:
        for scheme in ("light", "dark"):
            page, wrong = opened(browser, url, size=size, scheme=scheme)
            assert page.inner_text("h1") == "a <b> & c" and page.inner_text("#happened") == "90"
            assert "cut off in line 91" in page.inner_text("#notes")
            page.fill("#prompt", "w1 w2 <b>w3</b>")
            page.click("#ask button")
            page.wait_for_selector("#served tbody tr")
            # What was typed is text, whatever it looks like.
            assert page.locator("#served b").count() == 0
            page.click("#served tbody tr:nth-child(2)")
            assert page.locator("#served tr.on").count() == 1
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            page.wait_for_timeout(200)
            page.screenshot(path=artefacts / f"watch-{size}-{scheme}.png", full_page=True)
            assert wrong == []
            page.context.close()


def test_a_circle_tells_who_it_is_and_the_lineage_opens_in_the_page(
    run: Path, serve: Serve, browser: Any, artefacts: Path
) -> None:
    page, wrong = opened(browser, serve(run))
    page.locator(".layer canvas").nth(1).click(position={"x": 15, "y": 15})
    assert page.inner_text("#who").startswith("Expert ") and " of layer 1: " in page.inner_text("#who")
    page.click("#lineage summary")
    frame = page.frame_locator("#lineage iframe")
    frame.locator("body[data-ready=yes]").wait_for()
    frame.locator("#search").fill("0:0")
    frame.locator("#search").press("Enter")
    frame.locator('body[data-chosen="0:0"]').wait_for()
    page.wait_for_timeout(300)
    page.screenshot(path=artefacts / "watch-lineage.png", full_page=True)
    assert wrong == []
    page.context.close()


def test_a_thousand_experts_in_each_of_sixteen_layers_fit_a_phone(
    serve: Serve, browser: Any, artefacts: Path, tmp_path: Path
) -> None:
    write_synthetic_run(tmp_path / "run", layers=16, founders=1000, events=3000, most=1008, steps=2000, every=1000)
    page, wrong = opened(browser, serve(tmp_path / "run"), size="phone")
    assert page.locator(".layer canvas").count() == 16
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.screenshot(path=artefacts / "watch-sixteen-thousand.png", full_page=True)
    assert wrong == []
    page.context.close()


def test_a_split_of_a_running_training_is_on_the_page_within_five_seconds(
    serve: Serve, browser: Any, artefacts: Path, tmp_path: Path
) -> None:
    model = busy_model(lifecycle={"enabled": False})
    run, happened, wanted, end = tmp_path / "run", [], threading.Event(), threading.Event()

    def act(trainer: Any, record: Any) -> None:
        time.sleep(0.02)
        if wanted.is_set() and not happened:
            happened.append((model.split_expert(1, 3, optimizer=trainer.optimizer), time.monotonic()))
        if end.is_set():
            trainer.max_steps = trainer.step

    url = serve(run)
    page, wrong = opened(browser, url)
    assert page.inner_text("#state") == "waiting" and "does not exist" in page.inner_text("#waiting")
    recorder = Recorder(run, model, max_steps=100_000)
    trainer = build(model, max_steps=100_000, hooks=[act, recorder, JsonLog(run / "log.jsonl")])
    training = threading.Thread(target=trainer.run)
    training.start()
    try:
        page.wait_for_selector("body[data-state=running]")
        page.wait_for_selector('canvas[aria-label="layer 1: 8 experts"]')
        assert page.inner_text("#experts") == "16"
        wanted.set()
        page.wait_for_selector("#events p:has-text('split of 3, newborn 8')")
        page.wait_for_selector('canvas[aria-label="layer 1: 9 experts"]')
        event, at = happened[0]
        seconds = time.monotonic() - at
        assert event_line(event) in page.inner_text("#events")
        assert page.inner_text("#experts") == "17" and page.inner_text("#happened") == "1"
        assert seconds < 5
        page.screenshot(path=artefacts / "watch-running.png", full_page=True)
    finally:
        end.set()
        training.join(60)
        recorder.close()
    page.wait_for_selector("body[data-state=finished]")
    shutil.rmtree(run)
    page.wait_for_selector("body[data-state=waiting]")
    assert wrong == []
    page.context.close()
