"""Publishing to a local Hub, and downloading from it as users do."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from birefnet import repository_folder
from birefnet.command_line import main
from birefnet.errors import CommandError
from birefnet.hub.checkpoints import build_config, build_processor, model_from_state_dict
from birefnet.hub.folders import write_folder
from birefnet.hub.publish import TAG, compare_results, run_in_fresh_process
from birefnet.hub.variant_card import variant_card
from birefnet.hub.variants import VARIANTS
from birefnet.photos.drawing import draw_picture

from ..conftest import TINY_CONFIG
from ..hub_server import Fault, HubClient, LoopbackHub
from .test_variants import OFFICIAL, stand_in_program


@pytest.fixture(scope="module")
def weights(tiny_model_folder):
    return tiny_model_folder / "model.safetensors"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, weights):
    """A folder of official files. All contain the same small model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "model.safetensors").symlink_to(weights)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder for the repositories that the client builds, by name."""
    return tmp_path_factory.mktemp("built")


@pytest.fixture(scope="module")
def client(hub, built, tmp_path_factory, weights, checkpoints):
    client = HubClient(hub.environment(tmp_path_factory.mktemp("home")))
    client.run(stand_in_program(weights))
    client.run(f"""
from birefnet.hub.publish import build_repository, upload_repository
def publish(name, repository):
    folder = Path({str(built)!r}, repository)
    if not folder.exists():
        build_repository(VARIANTS[name], repository, folder, checkpoints={str(checkpoints)!r})
    return upload_repository(folder, repository)
""")
    yield client
    client.close()


@pytest.fixture
def repository(request, hub):
    """A repository name for this test. Removes the faults of earlier tests."""
    hub.faults.clear()
    return "me/" + re.sub(r"\W+", "-", request.node.name)[-60:].strip("-")


def commits(hub, repository):
    return [commit.title for commit in hub.repositories[repository].commits]


def test_the_command_builds_verifies_and_publishes_what_users_download(hub, client, tmp_path, weights, checkpoints):
    options = ["publish", "portrait", "--repo", "me/BiRefNet-portrait", "--private", "--json", "--checkpoints"]
    printed = client.run(f"""
import contextlib, io
from birefnet.command_line import main
with contextlib.redirect_stdout(io.StringIO()) as printed:
    assert main({[*options, str(checkpoints)]!r}) == 0
result = printed.getvalue()
""")
    report = json.loads(printed)
    assert report["matte_difference"] <= 1e-3
    repository = hub.repositories["me/BiRefNet-portrait"]
    assert repository.private and report["changed"] and report["tag"] == TAG
    assert commits(hub, "me/BiRefNet-portrait") == ["initial commit", f"BiRefNet-portrait {TAG}"]
    assert repository.tags == {TAG: report["commit"]}
    code = {path.name for path in repository_folder().glob("*_birefnet.py")}
    assert set(hub.files("me/BiRefNet-portrait")) == code | {
        *("model.safetensors", "config.json", "preprocessor_config.json"),
        *("handler.py", "LICENSE", "README.md", ".gitattributes"),
    }
    assert_downloads(hub, tmp_path, "me/BiRefNet-portrait", weights)


def test_a_dry_run_builds_and_verifies_but_uploads_nothing(hub, tmp_path, weights, checkpoints, capsys, monkeypatch):
    facts = {"bytes": weights.stat().st_size, "sha256": None, "config": TINY_CONFIG}
    monkeypatch.setitem(VARIANTS, "portrait", dataclasses.replace(VARIANTS["portrait"], **facts))
    monkeypatch.setattr("birefnet.hub.publish.upload_repository", None)
    options = ["--dry-run", "--json", "--checkpoints", str(checkpoints), "--folder", str(tmp_path)]

    assert main(["publish", "portrait", "--repo", "me/rehearsal", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["matte_difference"] <= 1e-3 and "commit" not in report
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "rehearsal").iterdir()}
    assert report["files"] == sizes and sizes["model.safetensors"] == weights.stat().st_size

    assert main(["publish", "portrait", "--repo", "me/rehearsal", *options]) == 1
    assert "already exists" in capsys.readouterr().err


def assert_downloads(hub, tmp_path, repository, weights):
    """A program without this package loads the repository and cuts out a picture."""
    draw_picture().save(tmp_path / "photo.png")
    program = """
import sys
from transformers import AutoConfig, AutoModelForImageSegmentation, pipeline
repository, photo, out = sys.argv[1:]
model = AutoModelForImageSegmentation.from_pretrained(repository, trust_remote_code=True, revision=%r)
remover = pipeline("background-removal", model=repository, trust_remote_code=True)
remover(photo).save(out)
print(type(model).__name__, sum(p.numel() for p in model.parameters()), "birefnet" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program % TAG, repository, str(tmp_path / "photo.png"), str(tmp_path / "cutout.png")],
        env={**os.environ, **hub.environment(tmp_path / "stranger")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("BiRefNetForImageSegmentation ") and done.stdout.endswith(" False\n")
    with Image.open(tmp_path / "cutout.png") as cutout:
        assert (cutout.mode, cutout.size) == ("RGBA", (320, 256))
        assert np.asarray(cutout)[..., 3].std() > 1


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_name_is_published_with_its_own_settings(name, hub, client):
    repository = f"sixteen/BiRefNet-{name}"
    commit, changed = client.run(f"result = publish({name!r}, {repository!r})")
    assert changed and hub.repositories[repository].tags == {TAG: commit}

    files = hub.files(repository)
    processor, config = json.loads(files["preprocessor_config.json"]), json.loads(files["config.json"])
    settings = VARIANTS[name].processor
    assert {key: processor[key] for key in settings} == settings
    assert config["backbone"] == TINY_CONFIG["backbone"] and "background-removal" in config["custom_pipelines"]
    assert config["auto_map"]["AutoImageProcessor"].startswith("image_processing_birefnet.")
    assert f"# {VARIANTS[name].title}\n" in files["README.md"].decode()


def test_publishing_again_changes_nothing(hub, client, repository):
    first = client.run(f"result = publish('lite', {repository!r})")
    hub.requests.clear()
    assert client.run(f"result = publish('lite', {repository!r})") == [first[0], False]
    assert len(commits(hub, repository)) == 2
    assert not any("/commit/" in request or "lfs-upload" in request for request in hub.requests)


def test_a_version_with_other_contents_is_refused(hub, client, built, repository):
    client.run(f"publish('lite', {repository!r})")
    (built / repository / "README.md").write_text("---\nlicense: mit\n---\nanother")
    message = client.fail(f"publish('lite', {repository!r})")
    assert f"CommandError: {repository} already has {TAG} with other contents (README.md)" in message
    assert len(commits(hub, repository)) == 2


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT /lfs-upload", cut_after=100_000, times=100),
        Fault("PUT /lfs-upload", status=403),
        Fault("POST .*/preupload", status=500, times=100),
        Fault("POST .*/commit", status=500),
        Fault("POST .*/commit", cut_before_answer=True),
        Fault("POST .*/tag", status=503),
        Fault("POST /api/repos/create", cut_before_answer=True),
    ],
    ids=lambda fault: f"{fault.pattern.split('/')[-1]}-{fault.status or 'cut'}",
)
def test_an_interrupted_publish_is_finished_by_the_next(fault, hub, client, repository):
    client.run("import time; time.sleep = lambda seconds: None")
    hub.faults.append(Fault(**vars(fault)))
    if fault.pattern.startswith("PUT"):  # else the Hub has these weights from an earlier test and asks for no upload
        hub.forget_large_files()
    assert client.fail(f"publish('lite', {repository!r})").startswith(f"CommandError: {repository} was not published")
    hub.faults.clear()

    commit, changed = client.run(f"result = publish('lite', {repository!r})")
    assert changed and hub.repositories[repository].tags == {TAG: commit}
    assert commits(hub, repository) == ["initial commit", f"{repository.removeprefix('me/')} {TAG}"]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "run 'hf auth login'"),
        (403, "may write to the repository"),
        (409, "publish again"),
        (412, "publish again"),
    ],
)
def test_what_the_hub_refuses_is_explained(status, words, hub, client, repository):
    hub.faults.append(Fault("POST .*/commit", status=status))
    assert words in client.fail(f"publish('lite', {repository!r})")


def test_somebody_elses_commit_meanwhile_is_not_overwritten(hub, client, built, repository):
    client.run(f"publish('lite', {repository!r})")
    hub.repositories[repository].tags.clear()
    (built / repository / "README.md").write_text("---\nlicense: mit\n---\nanother")
    # The branch moves between reading its head and the commit.
    client.run("from types import SimpleNamespace\nfrom huggingface_hub import HfApi\nreal = HfApi.model_info")
    client.run("HfApi.model_info = lambda *arguments, **named: SimpleNamespace(sha=40 * '0')")
    message = client.fail(f"publish('lite', {repository!r})")
    client.run("HfApi.model_info = real")
    assert "somebody else changed the repository" in message
    assert len(commits(hub, repository)) == 2


def test_code_that_the_new_version_lacks_is_removed(hub, client, repository):
    hub.add_repository(repository, {"old_birefnet.py": b"", "notes.txt": b"mine", "README.md": b"old"})
    client.run(f"publish('lite', {repository!r})")
    files = hub.files(repository)
    assert "old_birefnet.py" not in files and files["notes.txt"] == b"mine" and files["README.md"] != b"old"


def test_all_means_the_sixteen_under_one_owner_and_goes_on_after_a_failure(capsys, monkeypatch):
    published = []

    def publish(variant, repository, arguments):
        published.append(repository)
        if variant.name == "HR":
            raise CommandError("no room")
        return {"variant": variant.name, "repository": repository, "files": {}, "commit": "c" * 40, "changed": True}

    monkeypatch.setattr("birefnet.hub.publish._publish", publish)
    assert main(["publish", "--all", "--repo", "me", "--json"]) == 1
    assert published == [f"me/BiRefNet-{name}" for name in OFFICIAL]
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [report["variant"] for report in reports if "error" in report] == ["HR"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--repo", "me"], "name one variant or use --all"),
        (["lite", "--all", "--repo", "me"], "name one variant or use --all"),
        (["--all", "--repo", "me/all"], "with --all, --repo is the owner only"),
        (["ultra", "--repo", "me/ultra"], "no variant 'ultra'"),
        (["RMBG-2.0", "--repo", "me/RMBG"], "CC BY-NC 4.0"),
        (["LayerD", "--repo", "me/LayerD"], "unknown"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_done(arguments, words, capsys):
    assert main(["publish", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_folder_that_computes_something_else_is_not_published(tiny_model_folder, tmp_path):
    state_dict = load_file(tiny_model_folder / "model.safetensors")
    model, processor = model_from_state_dict(build_config(TINY_CONFIG), state_dict), build_processor({})
    write_folder(tmp_path, model, processor, "card")
    picture = draw_picture()
    there = run_in_fresh_process(tmp_path, picture)
    assert compare_results(tmp_path, there, model, processor, picture) <= 1e-3

    with pytest.raises(CommandError, match=r"resizes a picture to \(1, 3, 1024, 1024\) instead of \(1, 3, 64, 64\)"):
        compare_results(tmp_path, there, model, build_processor({"size": {"height": 64, "width": 64}}), picture)
    model.decoder.conv_out1[0].bias.data += 1
    with pytest.raises(CommandError, match="differs by .* in a fresh process"):
        compare_results(tmp_path, there, model, processor, picture)
    (tmp_path / "decoder_birefnet.py").unlink()
    with pytest.raises(CommandError, match="does not load in a fresh process"):
        run_in_fresh_process(tmp_path, picture)


# Model cards


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_cards_carry_the_published_metrics_and_facts(variant):
    card = variant_card(variant, "me/model")
    metadata = yaml.safe_load(card.split("---")[1])

    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "image-segmentation"
    assert metadata["base_model"] == variant.repository
    values = [
        metric["value"]
        for index in metadata.get("model-index", [])
        for result in index["results"]
        for metric in result["metrics"]
    ]
    assert values == [value for row in variant.metrics for value in row["values"].values()]
    for fact in (variant.sha256, variant.license, variant.good_for, variant.avoid, variant.size_text):
        assert fact is None or fact in card
    assert all(widget["src"].startswith("https://") for widget in metadata["widget"])
    if variant.training_sets is None:
        assert "Training sets: unknown" in card


def test_unknown_licences_stay_unknown_and_the_caveat_is_told():
    metadata = yaml.safe_load(variant_card(VARIANTS["LayerD"], "me/layerd").split("---")[1])
    assert metadata["license"] == "unknown"
    assert "DIS5K) carry stricter terms" in variant_card(VARIANTS["DIS5K"], "me/dis")


# Inference Endpoints


@pytest.fixture(scope="module")
def handler(tiny_model_folder, tmp_path_factory):
    """The handler as the service creates it: the folder's file, run as a separate module."""
    import importlib.util
    import shutil

    folder = tmp_path_factory.mktemp("endpoint") / "repository"
    shutil.copytree(tiny_model_folder, folder)
    shutil.copy(repository_folder() / "handler.py", folder)
    specification = importlib.util.spec_from_file_location("handler", folder / "handler.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


def encoded(picture):
    import base64
    from io import BytesIO

    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_the_endpoint_serves_pictures_and_json(handler):
    picture = draw_picture(96, 64)
    cutout = handler({"inputs": picture})  # what the service makes of a request of type image/png
    assert (cutout.mode, cutout.size) == ("RGBA", (96, 64))

    from_json = handler({"inputs": encoded(picture)})  # and of one of type application/json
    assert from_json.tobytes() == cutout.tobytes()
    data_url = handler({"inputs": [f"data:image/png;base64,{encoded(picture)}"], "parameters": {"return_mask": True}})
    assert [matte.mode for matte in data_url] == ["L"]
    assert data_url[0].tobytes() == cutout.getchannel("A").tobytes()

    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    transparent = handler({"inputs": encoded(picture), "parameters": {"refine_foreground": False}})
    ratio = np.asarray(picture.getchannel("A")) / 255
    assert (np.asarray(transparent.getchannel("A")) <= np.ceil(255 * ratio)).all() and transparent.getextrema()[3][1]

    on_colour = handler({"inputs": picture, "parameters": {"background": "white"}})
    on_picture = handler({"inputs": picture, "parameters": {"background": encoded(Image.new("RGB", (9, 9), "white"))}})
    assert on_colour.mode == "RGB" and on_colour.tobytes() == on_picture.tobytes()


@pytest.mark.parametrize("inputs", [None, "", [], "/etc/hostname", "not a picture", encoded(draw_picture(8, 8))[:40]])
def test_the_endpoint_refuses_what_is_no_picture_and_reads_no_file(inputs, handler):
    with pytest.raises(ValueError, match=r"no inputs|Neither a URL nor a picture|it is not a picture"):
        handler({"inputs": inputs})
    with pytest.raises(ValueError, match="Neither a URL nor a picture"):
        handler({"inputs": draw_picture(32, 32), "parameters": {"background": str(Path(__file__))}})
