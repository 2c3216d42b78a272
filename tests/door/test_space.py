"""The folder of a Space: it stands on its own, shows the page, holds nothing that is not to be published."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from factories import save_with_words
from lives import busy_model
from synthetic_run import write_synthetic_run

from living_moe.cli import main
from living_moe.configuration.errors import CheckpointError
from living_moe.space import requirements, write_space
from living_moe.training.observatory import read_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with records and two saved models."""
    write_synthetic_run(tmp_path / "run", layers=2, founders=8, events=30, most=20, steps=200)
    header = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**header, "host": "my-desk", "pid": 4711}))
    model = busy_model()
    save_with_words(model, tmp_path / "run" / "checkpoint-9")
    (tmp_path / "run" / "checkpoint-9" / "training_state").mkdir()
    (tmp_path / "run" / "checkpoint-9" / "training_state" / "optimizer.safetensors").write_text("not for others")
    (tmp_path / "run" / "drawings").mkdir()
    return tmp_path / "run"


def front_matter(folder: Path) -> dict[str, Any]:
    _, matter, rest = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert rest.lstrip().startswith("# ")
    found: dict[str, Any] = yaml.safe_load(matter)
    return found


def test_the_app_of_the_folder_shows_the_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn", reason="the extra `watch` is not installed")
    space = tmp_path / "space"
    assert main(["space", str(run), str(space), "--title", 'Tom\'s "model": <1>']) == 0
    assert "Space written to" in capsys.readouterr().out
    # The package in the folder serves, not the one that is installed.
    page = space / "living_moe" / "training" / "observatory" / "watch_page.html"
    page.write_text(
        page.read_text(encoding="utf-8").replace("<main>", "<main><!-- of the folder -->"), encoding="utf-8"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SPACE_ID")}
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=space, env={**environment, "PORT": "0"}, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        with urllib.request.urlopen(url, timeout=60) as reply:
            shown = reply.read().decode()
        assert "of the folder" in shown and "<h1>Tom&#x27;s &quot;model&quot;: &lt;1&gt;</h1>" in shown
        with urllib.request.urlopen(url + "state", timeout=60) as reply:
            state = json.loads(reply.read())
        assert state["status"]["events"] == 30 and state["status"]["model"] == "final"
        assert state["population"]["layers"] and state["timeline"]["loss"]["mean"]
        asked = urllib.request.Request(url + "route", b'{"prompt": "w1 w2"}', {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as reply:
            assert json.loads(reply.read())["tokens"] == ["w1", "w2"]
        with urllib.request.urlopen(url + "lineage", timeout=60) as reply:
            assert b"plotly" in reply.read()
    finally:
        process.terminate()
        process.wait(20)


def test_the_folder_is_a_docker_space_and_holds_what_is_to_be_published(run: Path, tmp_path: Path) -> None:
    space = write_space(run, tmp_path / "space")
    matter = front_matter(space)
    assert (matter["sdk"], matter["app_port"], matter["title"]) == ("docker", 7860, "run")
    assert len(matter["short_description"]) <= 60
    assert "EXPOSE 7860" in (space / "Dockerfile").read_text() and "app.py" in (space / "Dockerfile").read_text()
    header = json.loads((space / "model" / "run.json").read_text())
    assert "host" not in header and "pid" not in header and header["founders"]
    names = {path.name for path in space.rglob("*")}
    assert "optimizer.safetensors" not in names and "__pycache__" not in names and "drawings" not in names
    assert (space / "model" / "final" / "tokenizer.json").is_file()
    assert (space / "living_moe" / "modeling_living_moe" / "lifecycle" / "policies" / "load.py").is_file()
    assert read_run(space / "model").events == read_run(run).events


def test_a_saved_model_alone_is_shown_from_its_own_tables(tmp_path: Path) -> None:
    model = busy_model()
    model.split_expert(0, 1)
    model.config.provenance = {"license": "MIT", "base_model": "someone/mixtral-small"}
    save_with_words(model, tmp_path / "saved")
    space = write_space(tmp_path / "saved", tmp_path / "space", title="A   title")
    matter = front_matter(space)
    assert (matter["license"], matter["models"], matter["title"]) == ("mit", ["someone/mixtral-small"], "A title")
    run = read_run(space / "model")
    assert run.state == "checkpoint" and run.events == list(model.lineage)


def test_requirements_name_what_serves_the_page_and_pin_what_is_installed() -> None:
    lines = requirements()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    assert {"torch", "transformers", "starlette", "uvicorn", "plotly"} <= {re.split("==", line)[0] for line in lines}
    assert "+" not in pinned["torch"] and not {"pytest", "wandb"} & set(pinned)


def test_nothing_is_overwritten_and_nothing_half_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("keep")
    assert main(["space", str(run), str(mine)]) == 1
    assert "never overwrites" in capsys.readouterr().err and (mine / "README.md").read_text() == "keep"

    assert main(["space", str(tmp_path / "nowhere"), str(tmp_path / "space")]) == 1
    assert "holds no saved model" in capsys.readouterr().err
    (run / "checkpoint-9" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="truncated"):
        write_space(run, tmp_path / "space")
    save_with_words(busy_model(), run / "checkpoint-10")
    monkeypatch.setattr("living_moe.space.requirements", lambda: (_ for _ in ()).throw(OSError("disk full")))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="disk full"):
        write_space(run, tmp_path / "space")
    assert sorted(tmp_path.iterdir()) == before
