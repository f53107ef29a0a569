"""`birefnet publish --space`: what is built runs by itself, and what is uploaded is what was built."""

import json

import pytest

from birefnet.command_line import main

from ..hub_server import HubClient, LoopbackHub


def test_the_space_is_built_started_and_published(tmp_path, capsys):
    options = ["--repo", "me/cutouts", "--folder", str(tmp_path), "--json"]
    assert main(["publish", "--space", "--dry-run", *options]) == 0  # starts app.py and has a picture cut out
    report = json.loads(capsys.readouterr().out)
    assert report["verified"] and "commit" not in report
    space = tmp_path / "cutouts"
    needed = (space / "requirements.txt").read_text()
    assert "gradio" in needed and "torch" in needed and "timm" in needed and "pytest" not in needed
    assert "sdk: gradio\nsdk_version: 6" in (space / "README.md").read_text()
    assert {"app.py", "birefnet/serve/page/page.js", "birefnet/repository/model.safetensors"} <= set(report["files"])
    assert not list(space.rglob("__pycache__"))

    with LoopbackHub(tmp_path / "hub") as hub:
        client = HubClient(hub.environment(tmp_path / "home"))
        upload = f"from birefnet.hub.publish import upload_repository\nresult = upload_repository({str(space)!r}, "
        commit, changed = client.run(upload + "'me/cutouts', repo_type='space')")
        assert changed and client.run(upload + "'me/cutouts', repo_type='space')") == [commit, False]
        client.close()
        assert set(hub.files("me/cutouts")) == {*report["files"], ".gitattributes"}
        assert "POST /api/spaces/me/cutouts/commit/main" in hub.requests


def test_a_space_of_variants_has_no_weights(tmp_path, capsys):
    options = ["--space", "--dry-run", "--repo", "me/cutouts", "--folder", str(tmp_path), "--json"]
    assert main(["publish", "general,Portrait", *options]) == 0
    assert '"--variant", "general,portrait"]))' in (tmp_path / "cutouts" / "app.py").read_text()
    assert not list(tmp_path.rglob("model.safetensors"))
    assert main(["publish", "nothing", *options]) == 2
    assert main(["publish", "--all", *options]) == 2
    assert "contradict" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def only_with_gradio():
    pytest.importorskip("gradio", reason="needs the extra `serve`")
