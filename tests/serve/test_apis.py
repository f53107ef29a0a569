"""The three interfaces and the batch, each asked as its clients ask."""

import base64
import io
import json
import zipfile

import httpx
import numpy as np
import pytest

from .conftest import drawn_photo, encode, opened


@pytest.fixture(scope="module")
def server(start):
    with start(names=("tiny", "portrait")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


PHOTO = drawn_photo(1)
ENCODED = encode(PHOTO)


@pytest.fixture(scope="module")
def expected(server):
    """The pipeline's own cut-out of the photo, without any server."""
    return server.parts.service.shelf._loaded["tiny"](PHOTO)


def removebg(client, **fields):
    files = {name: ("photo.png", fields.pop(name)) for name in ("image_file", "bg_image_file") if name in fields}
    return client.post("/v1.0/removebg", data=fields, files=files or None)


def test_removebg_gives_what_the_pipeline_gives(client, expected):
    answer = removebg(client, image_file=ENCODED, size="auto")
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    picture = opened(answer.content)
    visible = np.asarray(expected)[..., 3:] > 0  # colours below fully transparent pixels are cleared
    assert picture.size == PHOTO.size and picture.mode == "RGBA"
    assert np.array_equal(np.asarray(picture), np.asarray(expected) * visible)
    assert answer.headers["x-width"] == "90" and "x-credits-charged" not in answer.headers


def test_removebg_takes_base64_json_and_form_fields(client, expected):
    text = base64.b64encode(ENCODED).decode()
    as_form = removebg(client, image_file_b64=text, size="auto")
    body = {"image_file_b64": f"data:image/png;base64,{text}", "size": "auto"}
    as_json = client.post("/v1.0/removebg", json=body, headers={"Accept": "application/json"})
    data = as_json.json()["data"]
    assert base64.b64decode(data["result_b64"]) == as_form.content
    box = opened(as_form.content).getchannel("A").point([0] * 12 + [255] * 244).getbbox()
    left, top = data["foreground_left"], data["foreground_top"]
    assert (left, top, left + data["foreground_width"], top + data["foreground_height"]) == box


@pytest.mark.parametrize("size,pixels", [("preview", 250_000), ("regular", 250_000), ("medium", 1_500_000)])
def test_removebg_sizes(client, size, pixels):
    photo = encode(drawn_photo(2, 1600, 1000))
    picture = opened(removebg(client, image_file=photo, size=size, format="png").content)
    assert 0.97 * pixels < picture.width * picture.height <= pixels


def test_removebg_backgrounds_and_formats(client, expected):
    colour = opened(removebg(client, image_file=ENCODED, size="auto", bg_color="00ff00", format="png").content)
    assert colour.mode == "RGB"
    alpha = np.asarray(expected)[..., 3]
    assert (np.asarray(colour)[alpha == 0] == (0, 255, 0)).all()
    blue = encode(drawn_photo(3).point(lambda _: 0))
    picture = opened(removebg(client, image_file=ENCODED, bg_image_file=blue, size="auto", format="png").content)
    assert (np.asarray(picture)[alpha == 0] == 0).all()
    jpeg = removebg(client, image_file=ENCODED, size="auto", format="jpg")
    assert jpeg.headers["content-type"] == "image/jpeg" and opened(jpeg.content).mode == "RGB"
    gray = opened(removebg(client, image_file=ENCODED, size="auto", channels="alpha").content)
    assert gray.mode == "L" and np.array_equal(np.asarray(gray), alpha)
    archive = zipfile.ZipFile(io.BytesIO(removebg(client, image_file=ENCODED, format="zip", size="auto").content))
    assert archive.namelist() == ["color.jpg", "alpha.png"]
    assert np.array_equal(np.asarray(opened(archive.read("alpha.png"))), alpha)


def test_removebg_region_crop_and_place(client):
    region = removebg(client, image_file=ENCODED, size="auto", roi="20px 10% 70px 90%")
    alpha = np.asarray(opened(region.content))[..., 3]
    assert alpha.shape == (70, 90) and alpha[:, :20].max() == alpha[:, 70:].max() == alpha[:7].max() == 0
    whole = removebg(client, image_file=ENCODED, size="auto")
    cropped = removebg(client, image_file=ENCODED, size="auto", crop="true", crop_margin="10px 5px")
    width, height = (int(whole.headers[f"x-foreground-{name}"]) for name in ("width", "height"))
    assert opened(cropped.content).size == (width + 10, height + 20)
    placed = removebg(client, image_file=ENCODED, size="auto", scale="50%", position="0% 100%")
    left, top, width, height = (
        int(placed.headers[f"x-foreground-{name}"]) for name in ("left", "top", "width", "height")
    )
    assert left == 0 and top + height == 70 and max(width / 90, height / 70) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, "invalid_form"),
        ({"size": "auto"}, "missing_source"),
        ({"image_file": ENCODED, "image_file_b64": "aGVsbG8="}, "multiple_sources"),
        ({"image_file": b"hello"}, "invalid_photo"),
        ({"image_file_b64": "%%%"}, "invalid_photo"),
        ({"image_file": ENCODED, "size": "huge"}, "invalid_parameters"),
        ({"image_file": ENCODED, "bg_colour": "red"}, "invalid_parameters"),
        ({"image_file": ENCODED, "bg_color": "nothing"}, "invalid_colour"),
        ({"image_file": ENCODED, "roi": "0 0 10%"}, "invalid_parameters"),
        ({"image_file": ENCODED, "add_shadow": "true"}, "invalid_parameters"),
        ({"image_url": "http://127.0.0.1/photo.png"}, "url_not_allowed"),
    ],
)
def test_removebg_errors_are_in_its_form(client, fields, code):
    answer = removebg(client, **fields)
    assert 400 <= answer.status_code < 500
    (error,) = answer.json()["errors"]
    assert error["code"] == code and error["title"].endswith(".")


def test_removebg_takes_the_portrait_model_for_persons(server, client):
    assert removebg(client, image_file=ENCODED, type="person").headers["x-type"] == "person"
    assert "portrait" in server.parts.service.shelf.loaded


def test_the_removebg_package(server, tmp_path, monkeypatch):
    package = pytest.importorskip("removebg.removebg", reason="the client package removebg is not installed")
    monkeypatch.setattr(package, "API_ENDPOINT", f"{server.url}/v1.0/removebg")
    (tmp_path / "photo.png").write_bytes(ENCODED)
    package.RemoveBg("any-key", str(tmp_path / "errors.log")).remove_background_from_img_file(
        str(tmp_path / "photo.png"), size="auto"
    )
    (result,) = tmp_path.glob("*_no_bg.png")
    assert opened(result.read_bytes()).size == PHOTO.size


def test_rembg(client, expected):
    plain = client.post("/api/remove", files={"file": ENCODED})
    assert np.array_equal(np.asarray(opened(plain.content))[..., 3], np.asarray(expected)[..., 3])
    mask = client.post("/api/remove", files={"file": ENCODED}, data={"om": "true", "model": "birefnet-portrait"})
    assert opened(mask.content).mode == "L"
    white = client.post("/api/remove?bgc=255,255,255,255", files={"file": ENCODED})
    assert opened(white.content).mode == "RGB"
    assert "tiny, portrait" in client.post("/api/remove?model=u2net", files={"file": ENCODED}).json()["detail"]
    assert client.get("/api/remove").json()["code"] == "missing_source"
    assert client.get("/api/remove?url=file:///etc/hostname").json()["code"] == "invalid_url"


def test_openai_package(server, expected):
    openai = pytest.importorskip("openai", reason="the client package openai is not installed")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any-key", max_retries=0)
    answer = client.images.edit(
        image=("photo.png", ENCODED), prompt="remove the background", model="tiny", background="transparent"
    )
    picture = opened(base64.b64decode(answer.data[0].b64_json))
    assert np.array_equal(np.asarray(picture)[..., 3], np.asarray(expected)[..., 3])
    two = client.images.edit(image=[("a.png", ENCODED), ("b.png", ENCODED)], prompt="", background="opaque")
    assert [opened(base64.b64decode(image.b64_json)).mode for image in two.data] == ["RGB", "RGB"]
    assert [model.id for model in client.models.list()] == ["tiny", "portrait"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=("photo.png", b"hello"), prompt="")
    assert caught.value.code == "invalid_photo"
    with pytest.raises(openai.BadRequestError, match="keeps no pictures"):
        client.images.edit(image=("photo.png", ENCODED), prompt="", response_format="url")


def test_batch_of_files_and_of_a_zip(client):
    photos = {f"{number}.png": encode(drawn_photo(number, 60 + number, 50)) for number in range(6)}
    files = [("files[]", (name, content)) for name, content in photos.items()]
    files.insert(2, ("files[]", ("broken.png", ENCODED[:300])))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        for _, (name, content) in files:
            archive.writestr(f"../folder/{name}", content)
        archive.writestr("__MACOSX/._0.png", b"x")
    for sent in (files, [("files[]", ("photos.zip", zipped.getvalue()))]):
        answer = client.post("/v1/batch", files=sent, data={"background": "white"})
        assert answer.status_code == 200 and answer.headers["transfer-encoding"] == "chunked"
        archive = zipfile.ZipFile(io.BytesIO(answer.content))
        assert archive.testzip() is None
        report = {entry["photo"].rsplit("/", 1)[-1]: entry for entry in json.loads(archive.read("report.json"))}
        assert "damaged" in report.pop("broken.png")["error"]
        assert list(report) == list(photos)
        for number, entry in enumerate(report.values()):
            assert ".." not in entry["result"] and opened(archive.read(entry["result"])).size == (60 + number, 50)


def test_batch_without_photos_is_refused(client):
    assert client.post("/v1/batch", data={"mask": "true"}).json()["code"] == "missing_source"
    assert client.post("/v1/batch", files={"a": ("a.zip", b"no archive")}).json()["code"] == "invalid_archive"
    both = [("a", ("a.zip", b"")), ("b", ("b.png", ENCODED))]
    assert client.post("/v1/batch", files=both).json()["code"] == "multiple_sources"


def test_status_metrics_and_documentation(client):
    removebg(client, image_file=ENCODED)
    assert client.get("/health").json()["status"] == "ok" and client.get("/ready").status_code == 200
    metrics = client.get("/metrics").text
    for name in ("requests_total", "queue_photos", "batch_photos_count", 'stage_seconds_count{stage="network"}'):
        assert f"birefnet_{name}" in metrics
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1.0/removebg", "/api/remove", "/v1/images/edits", "/v1/batch", "/v1/models"} <= set(paths)
    fields = paths["/v1.0/removebg"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert {"image_file", "image_url", "size", "roi", "crop", "bg_color"} <= set(fields)
    page = client.get("/docs").text
    assert "http://" not in page and "https://" not in page  # nothing from another host


def test_headers_of_every_answer(client):
    for answer in (client.get("/health"), client.get("/nowhere"), removebg(client, image_file=b"x")):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "server" not in answer.headers


def test_keys(start):
    from birefnet.serve.keys import ApiKeys

    with start(keys=ApiKeys(["a-secret-key-of-a-shop", "another-secret-key"])) as server:
        url = f"{server.url}/v1.0/removebg"
        for headers in ({}, {"X-Api-Key": "wrong"}, {"Authorization": "Basic a-secret-key-of-a-shop"}):
            answer = httpx.post(url, files={"image_file": ENCODED}, headers=headers)
            assert answer.status_code == 401 and answer.json()["errors"][0]["code"] == "auth_failed"
        for headers in ({"X-Api-Key": "another-secret-key"}, {"Authorization": "Bearer a-secret-key-of-a-shop"}):
            assert httpx.post(url, files={"image_file": ENCODED}, headers=headers).status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/health").status_code == 200
