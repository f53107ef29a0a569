"""The table of checkpoints, and downloading them from a local Hub."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file

from birefnet.command_line import main
from birefnet.hub.checkpoints import build_config
from birefnet.hub.download import fetch_checkpoint
from birefnet.hub.folders import official_config, write_weights
from birefnet.hub.load import load_variant
from birefnet.hub.variants import KINDS, VARIANTS, choose_variant, get_variant, variants_table
from birefnet.hub.verification import compute_matte
from birefnet.photos.drawing import draw_picture
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation

from ..conftest import TINY_CONFIG
from ..hub_server import Fault, HubClient, LoopbackHub


ROOT = Path(__file__).parents[2]
OFFICIAL = [
    *("general", "lite", "lite-2K", "HR", "HR-matting", "dynamic", "dynamic-matting", "matting", "lite-matting"),
    *("portrait", "DIS5K", "DIS5K-TR_TEs", "HRSOD", "COD", "legacy", "512x512"),
]
DERIVED = ["RMBG-2.0", "ToonOut", "LayerD", "general-fp32"]
DTYPES = {"float16": "fp16", "float32": "fp32"}


@pytest.fixture(scope="module")
def published():
    """The known facts by repository, collected from public sources. `null` means unknown."""
    return json.loads((ROOT / "tests/fixtures/published_variants.json").read_text())


def test_the_table_has_the_sixteen_and_the_derived_ones():
    assert [name for name, variant in VARIANTS.items() if variant.official] == OFFICIAL
    assert [name for name, variant in VARIANTS.items() if not variant.official] == DERIVED


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_fact_of_an_official_checkpoint_is_the_published_one(name, published):
    variant, facts = VARIANTS[name], published[VARIANTS[name].repository]

    for field in ("file", "bytes", "sha256", "revision", "parameters", "license"):
        assert getattr(variant, field) == facts[field], field
    assert DTYPES[variant.dtype] == facts["dtype"]
    assert variant.config["backbone"] == facts["backbone"]
    for field in ("training_sets", "validation_sets"):
        assert getattr(variant, field) == (facts[field] and tuple(facts[field])), field
    assert [[row[key] for key in ("dataset", "method", "resolution", "values")] for row in variant.metrics] == (
        facts["metrics"]
    )
    size, trained = variant.processor.get("size"), variant.training_size
    assert (size and [size["width"], size["height"]]) == facts["inference_wh"]
    assert (trained and [trained["width"], trained["height"]]) == facts["training_wh"]
    assert variant.processor.get("do_dynamic_resize", False) == (facts["inference_wh"] is None)


@pytest.mark.parametrize("name", ["RMBG-2.0", "ToonOut", "LayerD"])
def test_every_fact_of_a_derived_checkpoint_is_the_published_one(name, published):
    variant, facts = VARIANTS[name], published[VARIANTS[name].repository]
    for field in ("file", "bytes", "sha256", "license"):
        assert getattr(variant, field) == facts[field], field


def test_the_repositories_of_all_established_facts_are_in_the_table(published):
    assert {variant.repository for variant in VARIANTS.values()} == set(published)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_says_when_to_use_it_and_builds_a_configuration(variant):
    assert variant.good_for.endswith(".") and variant.avoid.endswith(".")
    config = build_config(variant.config)
    assert (config.backbone, config.task) == (variant.config["backbone"], variant.config["task"])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("portrait", "portrait"),
        ("hr_MATTING", "HR-matting"),
        ("ZhengPeng7/BiRefNet", "general"),
        ("BiRefNet_lite-2K", "lite-2K"),
        ("ZhengPeng7/BiRefNet_T", "lite"),
        ("ZhengPeng7/BiRefNet-massive", "legacy"),
        ("general-fp32", "general-fp32"),
    ],
)
def test_names_aliases_and_repositories_lead_to_the_variant(text, name):
    assert get_variant(text).name == name


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no variant 'ultra'\. The variants are general, lite, .*LayerD"):
        get_variant("ultra")


@pytest.mark.parametrize(
    "kind", ["product", "portrait", "hair", "glass", "camouflaged", "large print", "video", "cpu"]
)
def test_every_kind_of_picture_leads_to_a_variant_with_a_reason(kind):
    name, reason = choose_variant(kind)
    assert name in VARIANTS and len(reason) > 40


def test_which_prints_name_and_reason(capsys):
    assert main(["variants", "which", "camouflaged"]) == 0
    assert capsys.readouterr().out.startswith("COD (ZhengPeng7/BiRefNet-COD)\nIt is the only variant")

    assert main(["variants", "which", "large", "print", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["variant"] == "HR"


def test_which_asks_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: str(1 + list(KINDS).index("portrait")))
    assert main(["variants", "which"]) == 0
    assert "portrait (ZhengPeng7/BiRefNet-portrait)" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["which"], ["which", "selfie-of-a-ghost"]])
def test_which_refuses_what_it_does_not_know(arguments, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert main(["variants", *arguments]) == 2
    assert "camouflaged" in capsys.readouterr().err


def test_the_command_prints_the_whole_table(capsys):
    assert main(["variants"]) == 0
    table = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{table}" for name in VARIANTS)

    assert main(["variants", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    expected = json.loads(json.dumps([dataclasses.asdict(variant) for variant in VARIANTS.values()]))
    assert entries == expected


def test_the_documentation_has_the_table():
    rows = variants_table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(VARIANTS)
    # To update: python -c "from birefnet.hub.variants import variants_table; print(variants_table())"
    assert variants_table() in (ROOT / "docs/choosing-a-variant.md").read_text()


# The local Hub. Every variant's repository contains the same small model, and the table is patched to expect it.


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_model_folder):
    pickled = tmp_path_factory.mktemp("pickled") / "distributed_and_compiled.pth"
    state_dict = load_file(tiny_model_folder / "model.safetensors")
    torch.save({f"module._orig_mod.{key}": tensor for key, tensor in state_dict.items()}, pickled)
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        for variant in VARIANTS.values():
            file = tiny_model_folder / "model.safetensors"
            if variant.weights_file.endswith(".pth"):
                file = pickled
            files = {variant.weights_file: file, "config.json": b'{"architectures": ["BiRefNet"]}'}
            if variant.name != "general-fp32":
                hub.add_repository(variant.repository, files, variant.revision, gated=variant.gated)
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory, tiny_model_folder):
    client = HubClient(hub.environment(tmp_path_factory.mktemp("home")))
    client.run(stand_in_program(tiny_model_folder / "model.safetensors"))
    # Its authors published a torch.save file with the prefixes of distributed, compiled training.
    client.run("VARIANTS['ToonOut'] = dataclasses.replace(VARIANTS['ToonOut'], bytes=None, sha256=None)")
    yield client
    client.close()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_faults_left(request):
    yield
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").faults.clear()


def stand_in_program(weights):
    """Statements that patch the table to describe a small model's file instead of the published files."""
    from birefnet.hub.download import _sha256

    return f"""
import dataclasses
from pathlib import Path
from birefnet.hub.load import load_variant
from birefnet.hub.variants import VARIANTS, get_variant
from birefnet.hub.download import fetch_checkpoint
for name, variant in VARIANTS.items():
    sha256 = None if variant.sha256 is None else {_sha256(weights)!r}
    VARIANTS[name] = dataclasses.replace(
        variant, bytes={weights.stat().st_size}, sha256=sha256, config={TINY_CONFIG!r} | {{"task": "general"}}
    )
"""


def fetch(name, cache, **arguments):
    return f"result = str(fetch_checkpoint(VARIANTS[{name!r}], cache_dir={str(cache)!r}, **{arguments!r}))"


def cached_files(cache):
    return [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 1000]


def test_a_file_is_fetched_once_and_checked(hub, client, cache, tiny_model_folder):
    hub.requests.clear()
    path = Path(client.run(fetch("portrait", cache)))
    assert path.read_bytes() == (tiny_model_folder / "model.safetensors").read_bytes()
    assert path.parent.name == VARIANTS["portrait"].revision

    assert client.run(fetch("portrait", cache)) == str(path)
    assert sum(request.startswith("GET /lfs-files") for request in hub.requests) == 1


def test_a_cut_connection_is_resumed(hub, client, cache, tiny_model_folder):
    hub.faults.append(Fault("GET /lfs-files", cut_after=300_000))
    path = Path(client.run(fetch("lite", cache)))
    assert path.read_bytes() == (tiny_model_folder / "model.safetensors").read_bytes()


def test_a_connection_cut_again_and_again_leaves_nothing_behind(hub, client, cache):
    client.run("import time; sleep, time.sleep = time.sleep, lambda seconds: None")
    hub.faults.append(Fault("GET /lfs-files", cut_after=0, times=100))
    message = client.fail(fetch("lite", cache))
    client.run("time.sleep = sleep")
    assert "lite (ZhengPeng7/BiRefNet_lite) could not be downloaded completely" in message
    assert cached_files(cache) == []


def test_a_wrong_file_is_refused_and_fetched_anew(hub, client, cache):
    hub.faults.append(Fault("GET /lfs-files", corrupt=True))
    message = client.fail(fetch("COD", cache))
    assert message.startswith("DownloadError: ") and "is not the published COD: its SHA-256 is" in message
    assert cached_files(cache) == []
    assert client.run(fetch("COD", cache))


def test_where_the_table_has_no_hash_the_hubs_own_is_checked(hub, client, cache):
    assert VARIANTS["DIS5K"].sha256 is None
    hub.faults.append(Fault("GET /lfs-files", corrupt=True))
    assert "is not the published DIS5K" in client.fail(fetch("DIS5K", cache))
    assert client.run(fetch("DIS5K", cache))


def test_another_file_than_the_published_one_is_refused(hub, client, cache):
    blob = hub.store(b"another" * 1000, large=True)
    files = hub.repositories["ZhengPeng7/BiRefNet-HRSOD"].commits[-1].files
    published = files["model.safetensors"]
    files["model.safetensors"] = blob
    try:
        message = client.fail(fetch("HRSOD", cache))
    finally:
        files["model.safetensors"] = published
    assert "is incomplete: it has 7,000 bytes, HRSOD has" in message
    assert cached_files(cache) == []


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (404, "RepoNotFound", "was not found, or needs a login: run 'hf auth login'"),
        (404, "RevisionNotFound", "the revision in the table no longer exists"),
        (404, "EntryNotFound", "the repository has no such weights file"),
        (401, None, "the Hub rejected your token; run 'hf auth login'"),
        (403, None, "is not in the cache, and the download failed (403 Forbidden"),
        (500, None, "is not in the cache, and the download failed (Server error '500"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub, client, cache, status, code, words):
    client.run("import time; sleep, time.sleep = time.sleep, lambda seconds: None")
    hub.faults.append(Fault("HEAD /ZhengPeng7/BiRefNet-matting/resolve", status=status, code=code, times=100))
    message = client.fail(fetch("matting", cache))
    client.run("time.sleep = sleep")
    assert message.startswith("DownloadError: matting (ZhengPeng7/BiRefNet-matting)") and words in message
    assert cached_files(cache) == []


def test_a_gated_repository_says_where_to_ask(client, cache):
    message = client.fail(fetch("RMBG-2.0", cache, token=False))
    assert "RMBG-2.0 (briaai/RMBG-2.0) is gated: accept its terms on http" in message
    assert client.run(fetch("RMBG-2.0", cache))  # with a token


def test_an_abbreviated_revision_is_completed(hub, client, cache):
    oid = "679f743c" + 32 * "0"
    commit = hub.repositories["cyberagent/layerd-birefnet"].commits[-1]
    commit.oid = oid
    assert Path(client.run(fetch("LayerD", cache))).parent.name == oid


def test_a_full_disk_is_noticed_before_the_download(hub, client, cache):
    client.run("import shutil; from types import SimpleNamespace; usage = shutil.disk_usage")
    client.run("shutil.disk_usage = lambda path: SimpleNamespace(free=1000)")
    hub.requests.clear()
    message = client.fail(fetch("matting", cache))
    client.run("shutil.disk_usage = usage")
    assert "matting does not fit on the disk" in message and "0 MB are free" in message
    assert not any(request.startswith("GET") for request in hub.requests)


def test_a_disk_that_fills_up_leaves_nothing_behind(client, cache):
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    client.run(limit + "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))")
    message = client.fail(fetch("matting", cache))
    client.run("resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))")
    assert "does not fit on the disk" in message
    assert cached_files(cache) == []


def test_offline_means_the_cache_alone(hub, client, cache):
    client.run("from huggingface_hub import constants; constants.HF_HUB_OFFLINE = True")
    hub.requests.clear()
    message = client.fail(fetch("dynamic", cache))
    client.run("constants.HF_HUB_OFFLINE = False")
    assert "dynamic (ZhengPeng7/BiRefNet_dynamic) is not in the cache, and HF_HUB_OFFLINE is set" in message
    assert hub.requests == []


def test_a_local_folder_is_used_and_never_changed(client, tmp_path, cache, tiny_model_folder):
    folder = tmp_path / "files" / "BiRefNet-COD"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes((tiny_model_folder / "model.safetensors").read_bytes())
    assert client.run(fetch("COD", cache, folder=str(folder.parent))) == str(folder / "model.safetensors")
    assert client.run(fetch("COD", cache, folder=str(folder))) == str(folder / "model.safetensors")

    (folder / "model.safetensors").write_bytes(b"short")
    assert "is incomplete" in client.fail(fetch("COD", cache, folder=str(folder)))
    assert (folder / "model.safetensors").read_bytes() == b"short"
    assert "is not in the folder" in client.fail(fetch("COD", cache, folder=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("name", [*OFFICIAL, *DERIVED])
def test_every_variant_loads_with_its_size_and_dtype(name, hub, client, cache):
    if name == "general-fp32":
        hub.repositories["ZhengPeng7/BiRefNet"].commits[-1].oid = "bb4456a" + 33 * "0"
    loaded = client.run(f"""
import torch
model, processor = load_variant({name!r}, cache_dir={str(cache)!r})
result = [str(model.dtype), model.training, processor.size, processor.do_dynamic_resize, processor.maximum_size]
result.append(model.state_dict()["decoder.conv_out1.0.weight"].sum().item())
""")
    settings = VARIANTS[name].processor
    size = settings.get("size", {"height": 1024, "width": 1024})
    assert loaded[:4] == ["torch.float32", False, size, settings.get("do_dynamic_resize", False)]
    assert loaded[4] == 2304 and loaded[5] != 0
    if name == "general-fp32":
        hub.repositories["ZhengPeng7/BiRefNet"].commits[-1].oid = VARIANTS["general"].revision


def test_from_pretrained_recognises_an_official_repository_by_its_tensors(hub, client, tmp_path):
    torch.manual_seed(0)
    model = BiRefNetForImageSegmentation(build_config({"backbone": "swin_v1_t"})).half()
    write_weights(tmp_path / "model.safetensors", model.state_dict())
    config = json.dumps(official_config("swin_v1_t")).encode()
    name = "ZhengPeng7/BiRefNet_T"
    hub.add_repository(name, {"model.safetensors": tmp_path / "model.safetensors", "config.json": config})
    loaded = client.run(f"""
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation
model = BiRefNetForImageSegmentation.from_pretrained({name!r}, cache_dir={str(tmp_path / "cache")!r})
sums = [model.decoder.conv_out1[0].weight.float().sum().item(), model.bb.norm3.weight.float().sum().item()]
result = [model.config.backbone, str(model.dtype), model.num_parameters(), sums]
""")
    sums = [model.decoder.conv_out1[0].weight.float().sum().item(), model.bb.norm3.weight.float().sum().item()]
    assert loaded == ["swin_v1_t", "torch.float16", VARIANTS["lite"].parameters, sums]


# The live Hub


@pytest.fixture(scope="module")
def live_hub():
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError as error:
        pytest.skip(f"no network: {constants.ENDPOINT} cannot be reached ({error})")


@pytest.mark.hub
@pytest.mark.parametrize("name", OFFICIAL)
def test_the_published_file_is_what_the_table_says_and_cuts_out(name, live_hub):
    variant = VARIANTS[name]
    path = fetch_checkpoint(variant)  # bytes and hash
    with torch.device("meta"):
        expected = BiRefNetForImageSegmentation(build_config(variant.config)).state_dict()
    found = load_file(path)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in expected.items()}
    assert {value.dtype for value in found.values()} == {getattr(torch, variant.dtype), torch.int64}

    model, processor = load_variant(name)
    matte = compute_matte(model, processor, draw_picture())
    assert matte.shape == (256, 320) and matte.min() >= 0 and matte.max() <= 1
    assert matte.std() > 0.05  # something was told from something else


def command(hub, home, *arguments, program, **environment):
    """Runs the console command in a fresh process with the local Hub and the patched table."""
    program += "\nimport sys\nfrom birefnet.command_line import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, **hub.environment(home), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_cutout_with_a_variant_and_then_offline(hub, tmp_path, tiny_model_folder):
    photo = tmp_path / "photo.png"
    draw_picture().save(photo)
    program = stand_in_program(tiny_model_folder / "model.safetensors")
    options = ("cutout", photo, "--variant", "dynamic", "--overwrite", "-o", tmp_path / "out.png")

    done = command(hub, tmp_path / "home", *options, program=program)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out.png") as cutout:
        assert (cutout.mode, cutout.size) == ("RGBA", (320, 256))
        first = cutout.tobytes()

    hub.requests.clear()
    again = command(hub, tmp_path / "home", *options, program=program, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert hub.requests == []
    with Image.open(tmp_path / "out.png") as cutout:
        assert cutout.tobytes() == first
