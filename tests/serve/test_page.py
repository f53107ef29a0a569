"""The page in a real browser: Debian's Chromium, without a screen and without any other host."""

import re
import shutil
import zipfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from .conftest import RunningServer, encode, opened


playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, to steer a browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def shaded_disc(width: int = 320, height: int = 240, tint: int = 0) -> Image.Image:
    """A subject that the embedded weights find: a bright disc before a dark ground."""
    rows, columns = np.mgrid[:height, :width]
    disc = ((rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (height / 3) ** 2)[..., None]
    ground = np.stack([rows // 8, columns // 8, 40 + 0 * rows], axis=-1)
    return Image.fromarray(np.where(disc, [230, 150 + tint, 60], ground).astype(np.uint8))


@pytest.fixture(scope="module")
def server():
    from birefnet.inference import load_remover
    from birefnet.serve import create_app

    loaders = {"embedded": load_remover, "portrait": lambda: load_remover(resolution=(256, 256))}
    with RunningServer(create_app(loaders, workers=1)) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as steering:
        browser = steering.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(30_000)
    page.asked, page.faults = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#photos input[type=file]", state="attached")
    yield page
    hosts = {url.split("/")[2] for url in page.asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {f"127.0.0.1:{server.port}"} and page.faults == []
    context.close()


@pytest.fixture
def photos(tmp_path):
    """Writes photos; gives their paths."""

    def write(count: int, **options) -> list[str]:
        paths = [tmp_path / f"photo {number}.png" for number in range(count)]
        for number, path in enumerate(paths):
            shaded_disc(tint=4 * number, **options).save(path)
        return [str(path) for path in paths]

    return write


def network_calls(server) -> int:
    text = httpx.get(f"{server.url}/metrics").text
    return int(float(re.search(r"birefnet_batch_photos_sum (\S+)", text)[1]))


def choose(page, paths: list[str]):
    page.set_input_files("#photos input[type=file]", paths)


def wait_for_status(page, text: str):
    page.wait_for_function("(text) => document.querySelector('#status').innerText.includes(text)", arg=text)


def shown(page, which: str = "after") -> Image.Image:
    """The picture that the viewer shows once it is loaded."""
    page.wait_for_function(
        f"() => {{ const image = document.querySelector('#viewer .{which}');"
        " return image.src && image.src.endsWith(image.dataset.wanted) && image.complete; }"
    )
    return opened(page.request.get(page.evaluate(f"document.querySelector('#viewer .{which}').src")).body())


def changed(page, before: str):
    page.wait_for_function("(before) => document.querySelector('#viewer .after').src !== before", arg=before)


def after_source(page) -> str:
    return page.evaluate("document.querySelector('#viewer .after').src")


def test_upload_slider_edits_colour_variant_and_download(page, server, photos):
    choose(page, photos(1))
    wait_for_status(page, "Done.")
    cutout = shown(page)
    assert cutout.mode == "RGBA" and cutout.size == (320, 240)
    assert cutout.getpixel((160, 120))[3] > 200 and cutout.getpixel((5, 5))[3] < 50

    slider = page.locator("#viewer .split input")
    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("document.querySelector('#viewer .frame').style.getPropertyValue('--split')") == "60%"

    calls, source = network_calls(server), after_source(page)
    page.click("#background >> text=Colour")
    page.fill("#colour input, #colour textarea", "#00ff00")
    page.keyboard.press("Tab")
    page.wait_for_timeout(300)
    changed(page, source)
    green = poll(page, lambda picture: picture.mode == "RGB" and picture.getpixel((5, 5))[1] > 200)
    assert green.getpixel((160, 120))[0] > 150

    page.fill("#colour input, #colour textarea", "no colour")
    wait_for_status(page, "is not a colour")
    page.fill("#colour input, #colour textarea", "white")
    page.click("#background >> text=Blur")
    poll(page, lambda picture: picture.getpixel((5, 5))[2] < 90)
    page.click("#background >> text=Transparent")
    page.click("text=Edit the mask")
    page.get_by_label("Keep the background instead").check()
    poll(page, lambda picture: picture.mode == "RGBA" and picture.getpixel((160, 120))[3] < 50)
    page.get_by_label("Keep the background instead").uncheck()
    poll(page, lambda picture: picture.mode == "RGBA" and picture.getpixel((160, 120))[3] > 200)
    assert network_calls(server) == calls  # all of that from the kept output of the network

    with page.expect_download() as download:
        page.click("#viewer .download")
    result = Image.open(download.value.path())
    assert download.value.suggested_filename == "photo 0-cutout.png" and result.size == (320, 240)
    expected = server.parts.service.shelf._loaded["embedded"](shaded_disc())
    assert np.array_equal(np.asarray(result)[..., 3], np.asarray(expected)[..., 3])

    page.get_by_label("Variant").click()
    page.get_by_role("option", name="portrait").click()
    page.wait_for_function("() => document.querySelector('#viewer .after').src.includes('portrait')")
    assert network_calls(server) == calls + 1
    assert "rtrait" in page.inner_text(".gradio-container")

    uploads = Path(server.app.state.uploads.name)
    assert [path for path in uploads.rglob("*") if path.suffix == ".png"] == []  # no photo is on the disk


def poll(page, wanted, seconds: float = 15) -> Image.Image:
    """The viewer's picture as soon as it is as wanted."""
    for _ in range(int(seconds / 0.25)):
        picture = shown(page)
        if wanted(picture):
            return picture
        page.wait_for_timeout(250)
    raise AssertionError(f"the picture is {picture.mode}, with {picture.getpixel((160, 120))} in the middle")


def test_twenty_photos_one_of_them_broken_and_a_zip(page, server, photos, tmp_path):
    paths = photos(20)
    (tmp_path / "broken.png").write_bytes(Path(paths[0]).read_bytes()[:200])
    choose(page, [*paths[:5], str(tmp_path / "broken.png"), *paths[5:]])
    wait_for_status(page, "of 21")  # progress
    wait_for_status(page, "20 of 21 photos cut out.")
    assert "broken.png" in page.inner_text("#status [role=alert]") and "damaged" in page.inner_text("#status")
    assert page.locator("#strip button").count() == 20
    page.locator("#strip button").nth(12).press("Enter")
    page.wait_for_function("() => document.querySelector('#viewer .caption').innerText.startsWith('photo 12')")
    with page.expect_download() as download:
        page.click("#viewer .archive")
    archive = zipfile.ZipFile(download.value.path())
    assert archive.testzip() is None
    assert archive.namelist() == [f"photo {number}-cutout.png" for number in range(20)]
    for number in (0, 13):  # each result is its own photo's
        assert opened(archive.read(f"photo {number}-cutout.png")).getpixel((160, 120))[1] == 150 + 4 * number
    page.click("#clear")
    wait_for_status(page, "All photos are removed.")
    assert page.is_hidden("#viewer .viewer")


def test_paste_zoom_and_the_end_of_the_session(page, server):
    content = encode(shaded_disc(1600, 1200))
    page.evaluate(
        """(bytes) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "pasted.png", { type: "image/png" }));
          document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true }));
        }""",
        list(content),
    )
    wait_for_status(page, "Done.")
    assert shown(page).size == (1280, 960)  # a preview
    page.click("#viewer [data-zoom=pixels]")
    page.wait_for_function("() => document.querySelector('#viewer .after').src.includes('/full.webp')")
    assert shown(page).size == (1600, 1200)
    assert page.inner_text("#viewer .zoom") == "100 %"
    assert page.evaluate("document.querySelector('#viewer .frame').clientWidth") == 1600
    address = after_source(page)
    assert httpx.get(address).status_code == 200
    page.goto("about:blank")
    for _ in range(40):
        if httpx.get(address).status_code == 404:
            break
        page.wait_for_timeout(250)
    assert httpx.get(address).status_code == 404  # the photo has gone with the visitor


def test_drop_and_heic(page, photos, tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="needs the extra `heif`")
    heif.from_pillow(shaded_disc(400, 300)).save(tmp_path / "phone.heic", quality=90)
    zone = page.locator("#photos").bounding_box()
    place = {"x": zone["x"] + zone["width"] / 2, "y": zone["y"] + zone["height"] / 2}
    dragged = {"items": [], "files": [*photos(1), str(tmp_path / "phone.heic")], "dragOperationsMask": 1}
    mouse = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        mouse.send("Input.dispatchDragEvent", {"type": kind, **place, "data": dragged})
    wait_for_status(page, "2 of 2 photos cut out.")
    page.locator("#strip button").nth(1).click()
    page.wait_for_function("() => document.querySelector('#viewer .caption').innerText.startsWith('phone.heic')")
    assert poll(page, lambda picture: picture.size == (400, 300)).getpixel((200, 150))[3] > 200


@pytest.mark.parametrize("width", [1280, 390])
def test_accessibility_and_phone_width(page, photos, width, node_modules):
    page.set_viewport_size({"width": width, "height": 844})
    choose(page, photos(2))
    wait_for_status(page, "2 of 2")
    page.click("text=Edit the mask")
    page.click("#background >> text=Colour")
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing is cut off at the side
    page.evaluate(Path(node_modules, "axe-core", "axe.min.js").read_text(encoding="utf-8"))
    faults = [
        (fault["id"], [node["html"][:120] for node in fault["nodes"]])
        for fault in page.evaluate("axe.run()")["violations"]
        if fault["impact"] in ("serious", "critical")
    ]
    assert faults == []


def test_the_page_asks_for_a_key_where_there_are_keys(browser):
    from birefnet.inference import load_remover
    from birefnet.serve import create_app
    from birefnet.serve.keys import ApiKeys

    with RunningServer(create_app({"embedded": load_remover}, keys=ApiKeys(["a-secret-key-of-a-shop"]))) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("input[type=password]")
        assert page.locator("#photos").count() == 0
        for key, status in (("wrong", 400), ("a-secret-key-of-a-shop", 200)):
            answer = httpx.post(f"{server.url}/login", data={"username": "anyone", "password": key})
            assert answer.status_code == status
        page.locator("input").first.fill("anyone")
        page.fill("input[type=password]", "a-secret-key-of-a-shop")
        page.get_by_role("button", name="Login").click()
        page.wait_for_selector("#photos")
        page.close()
