"""pipeline_birefnet: the "background-removal" pipeline, and transformers' own "image-segmentation" on our model."""

import base64
import functools
import http.server
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from .colour_profiles import matrix_profile


FRESH_PROCESS = """
import json, sys
from PIL import Image
from transformers import pipeline

folder, photo, out = sys.argv[1:]
options = {"model": folder, "trust_remote_code": True, "device": "cpu"}
remover = pipeline("background-removal", **options)
inferred = pipeline(**options)
segmenter = pipeline("image-segmentation", **options)
remover(photo, refine_foreground=False).save(f"{out}/cutout.png")
remover(photo, return_mask=True).save(f"{out}/matte.png")
inferred([photo, Image.open(photo)], batch_size=2, return_mask=True)[1].save(f"{out}/inferred.png")
segments = segmenter([photo, photo, photo], batch_size=2)
for segment in segments[2]:
    segment["mask"].save(f"{out}/{segment['label']}.png")
print(json.dumps({
    "classes": [type(pipe).__name__ for pipe in (remover, inferred, segmenter)],
    "tasks": [remover.task, inferred.task, segmenter.task],
    "labels": [[segment["label"] for segment in result] for result in segments],
}))
"""


def draw(width, height, seed=0):
    """A bright disc on noise."""
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 90, (height, width, 3))
    disc = np.hypot(rows / height - 0.5, columns / width - 0.5) < 0.3
    return Image.fromarray(np.where(disc[..., None], (250, 200, 40), noise).astype(np.uint8))


@pytest.fixture(scope="module")
def photo_path(tmp_path_factory):
    """A photo that stands upright only once its EXIF orientation is applied: 60 x 90 then."""
    path = tmp_path_factory.mktemp("photos") / "a photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(90, 60).save(path, exif=exif, quality=95)
    return path


@pytest.fixture(scope="module")
def remover(tiny_model_folder):
    from birefnet.repository.image_processing_birefnet import BiRefNetImageProcessor
    from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation
    from birefnet.repository.pipeline_birefnet import BiRefNetPipeline

    model = BiRefNetForImageSegmentation.from_pretrained(tiny_model_folder)
    processor = BiRefNetImageProcessor.from_pretrained(tiny_model_folder)
    return BiRefNetPipeline(model=model, image_processor=processor, device="cpu", task="background-removal")


def pixels(image):
    return np.asarray(image).astype(int)


def test_through_transformers_in_a_fresh_process(tiny_model_folder, photo_path, tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(tiny_model_folder), str(photo_path), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["classes"] == ["BiRefNetPipeline", "BiRefNetPipeline", "ImageSegmentationPipeline"]
    assert result["tasks"] == ["background-removal", "background-removal", "image-segmentation"]
    assert result["labels"] == [["background", "foreground"]] * 3
    opened = {path.stem: Image.open(path) for path in tmp_path.glob("*.png")}
    assert {image.size for image in opened.values()} == {(60, 90)}, "upright"
    assert opened["cutout"].mode == "RGBA" and opened["matte"].mode == "L"
    matte = pixels(opened["matte"])
    assert np.array_equal(pixels(opened["cutout"])[..., 3], matte)
    assert np.abs(pixels(opened["inferred"]) - matte).max() <= 1, "a batch can round differently"
    # The built-in pipeline's masks are the matte cut at one half; values next to it round either way.
    foreground = pixels(opened["foreground"])
    assert set(np.unique(foreground)) == {0, 255}
    assert np.array_equal(foreground, 255 - pixels(opened["background"]))
    clear = np.abs(matte - 127.5) > 1
    assert np.array_equal(foreground[clear] > 0, matte[clear] > 127)


def test_path_picture_and_list_give_the_same_cut_out(remover, photo_path):
    expected = remover(str(photo_path))
    assert expected.size == (60, 90) and expected.mode == "RGBA"
    for photo in (photo_path, Image.open(photo_path)):
        assert np.array_equal(pixels(remover(photo)), pixels(expected))
    several = remover([str(photo_path), str(photo_path)])
    assert isinstance(several, list) and len(several) == 2
    assert remover([]) == []
    streamed = remover(photo for photo in [str(photo_path)] * 3)
    assert not isinstance(streamed, list) and len(list(streamed)) == 3


def test_a_photo_from_the_web(remover, photo_path):
    handler = functools.partial(QuietHandler, directory=photo_path.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        cut_out = remover(f"http://127.0.0.1:{server.server_port}/a%20photo.jpg", timeout=20)
        server.shutdown()
    assert np.array_equal(pixels(cut_out), pixels(remover(photo_path)))


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("dynamic", [False, True])
def test_batches_give_what_single_photos_give(remover, dynamic, monkeypatch):
    monkeypatch.setattr(remover.image_processor, "do_dynamic_resize", dynamic)
    photos = [draw(300, 260, seed=1), draw(260, 300, seed=2), draw(300, 260, seed=3), draw(290, 270, seed=4)]
    singles = [remover(photo, return_mask=True) for photo in photos]
    batch = remover(photos, return_mask=True, batch_size=3)
    assert [matte.size for matte in batch] == [photo.size for photo in photos]
    for single, batched in zip(singles, batch, strict=True):
        assert np.abs(pixels(single) - pixels(batched)).max() <= 1


def test_batch_size_is_honoured(remover, monkeypatch):
    sizes = []
    forward = remover.model.forward
    monkeypatch.setattr(remover.model, "forward", lambda values: sizes.append(len(values)) or forward(values))
    remover([draw(64, 64, seed) for seed in range(5)], batch_size=2)
    assert sizes == [2, 2, 1]


def test_backgrounds(remover, photo_path, tmp_path):
    photo = draw(80, 60)
    matte = pixels(remover(photo, return_mask=True))[..., None] / 255
    for background, colour in (("#ff8000", (255, 128, 0)), ((0, 0, 255), (0, 0, 255))):
        result = remover(photo, background=background, refine_foreground=False)
        assert result.mode == "RGB"
        assert np.abs(pixels(result) - (matte * pixels(photo) + (1 - matte) * colour)).max() <= 1.5
    assert remover(photo, background="transparent").mode == "RGBA"
    beach = tmp_path / "beach.png"
    Image.new("RGB", (7, 7), (9, 99, 199)).save(beach)
    expected = pixels(remover(photo, background=(9, 99, 199)))
    for background in (beach, str(beach), Image.open(beach), np.asarray(Image.open(beach)), beach.read_bytes()):
        assert np.abs(pixels(remover(photo, background=background)) - expected).max() <= 1


def test_a_background_is_read_once_for_all_photos(remover, photo_path, monkeypatch):
    from birefnet.repository import photo_birefnet

    read = []
    read_picture = photo_birefnet.read_picture
    monkeypatch.setattr(photo_birefnet, "read_picture", lambda *a, **k: read.append(a[0]) or read_picture(*a, **k))
    remover([draw(64, 64), draw(64, 64), draw(64, 64)], background=str(photo_path))
    assert read.count(str(photo_path)) == 1


def test_refining_changes_colours_only_and_mask_edits_are_applied(remover):
    photo = draw(80, 60)
    plain, refined = remover(photo, refine_foreground=False), remover(photo, refine_foreground=True)
    assert np.array_equal(pixels(plain)[..., :3], pixels(photo))
    assert np.array_equal(pixels(plain)[..., 3], pixels(refined)[..., 3])
    assert np.abs(pixels(plain) - pixels(refined)).max() > 20
    assert np.array_equal(pixels(remover(photo)), pixels(refined)), "refined unless told otherwise"
    matte = pixels(remover(photo, return_mask=True))
    assert np.array_equal(pixels(remover(photo, return_mask=True, invert=True)), 255 - matte)
    assert set(np.unique(pixels(remover(photo, return_mask=True, threshold=0.5)))) == {0, 255}
    assert (pixels(remover(photo, return_mask=True, grow=2)) >= matte).all()
    assert (pixels(remover(photo, return_mask=True, sensitivity=0.5)) >= matte).all()
    assert np.abs(np.diff(pixels(remover(photo, return_mask=True, feather=8)))).max() < np.abs(np.diff(matte)).max()


def test_options_may_be_given_once_for_all_calls(remover):
    from birefnet.repository.pipeline_birefnet import BiRefNetPipeline

    options = {"return_mask": True, "invert": True, "batch_size": 2}
    fixed = BiRefNetPipeline(
        model=remover.model,
        image_processor=remover.image_processor,
        device="cpu",
        task="background-removal",
        **options,
    )
    photo = draw(70, 50)
    assert np.array_equal(pixels(fixed(photo)), pixels(remover(photo, return_mask=True, invert=True)))
    assert fixed([photo], invert=False)[0].mode == "L"


def test_wrong_arguments_are_named(remover, tmp_path):
    photo = draw(64, 64)
    with pytest.raises(TypeError, match=r"treshold.*sensitivity"):
        remover(photo, treshold=0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        remover(photo, threshold=5)
    with pytest.raises(ValueError, match="no-such-colour.*neither a colour"):
        remover(photo, background="no-such-colour")
    with pytest.raises((ValueError, OSError), match=r"missing\.jpg"):
        remover(str(tmp_path / "missing.jpg"))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_inputs_follow_the_model(tiny_model_folder, remover, dtype):
    from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation
    from birefnet.repository.pipeline_birefnet import BiRefNetPipeline

    model = BiRefNetForImageSegmentation.from_pretrained(tiny_model_folder, dtype=dtype)
    half = BiRefNetPipeline(model=model, image_processor=remover.image_processor, device="cpu")
    photo = draw(70, 50)
    difference = pixels(half(photo, return_mask=True)) - pixels(remover(photo, return_mask=True))
    assert np.abs(difference).mean() < 8


def transparent_photo(hidden=(0, 255, 0)):
    """A photo whose left half is fully transparent, its middle column band half transparent."""
    pixels = np.dstack([np.asarray(draw(80, 60)), np.full((60, 80), 255, np.uint8)])
    pixels[:, 40:50, 3] = 128
    pixels[:, :40] = (*hidden, 0)
    return Image.fromarray(pixels)


def test_the_alpha_of_a_transparent_photo_is_the_matte_times_its_own(remover):
    photo = transparent_photo()
    own = pixels(photo)[..., 3]
    opaque = np.where(own[..., None] > 0, pixels(photo)[..., :3], 255).astype(np.uint8)
    matte = pixels(remover(Image.fromarray(opaque), return_mask=True))
    cut_out = pixels(remover(photo))
    assert np.abs(cut_out[..., 3] - matte * own / 255).max() <= 1
    assert np.array_equal(pixels(remover(photo, return_mask=True)), cut_out[..., 3])
    other = pixels(remover(transparent_photo(hidden=(255, 0, 255))))
    assert np.array_equal(cut_out[own > 0], other[own > 0]), "hidden colours have no effect"
    assert not pixels(remover(photo, invert=True))[:, :40, 3].any(), "what is transparent stays so"
    plain = pixels(remover(photo, refine_foreground=False))
    visible = plain[..., 3] > 0
    assert np.array_equal(plain[visible][:, :3], pixels(photo)[visible][:, :3])
    on_blue = pixels(remover(photo, background=(0, 0, 255), refine_foreground=False))
    coverage = (matte * own / 255 / 255)[..., None]
    assert np.abs(on_blue - (coverage * pixels(photo)[..., :3] + (1 - coverage) * (0, 0, 255))).max() <= 1.5


def test_results_keep_profile_and_resolution(remover, tmp_path):
    photo, profile = draw(80, 60), matrix_profile()
    photo.save(tmp_path / "p3.png", icc_profile=profile, dpi=(300, 300))
    for options, mode in (({}, "RGBA"), ({"background": "white"}, "RGB"), ({"return_mask": True}, "L")):
        result = remover(tmp_path / "p3.png", **options)
        assert result.mode == mode and result.info.get("icc_profile") == (None if mode == "L" else profile)
        assert tuple(map(round, result.info["dpi"])) == (300, 300)
    remover(tmp_path / "p3.png").save(tmp_path / "cutout.png")
    assert Image.open(tmp_path / "cutout.png").info["icc_profile"] == profile
    untagged = remover(photo)
    assert not untagged.info
    assert np.array_equal(pixels(untagged), pixels(remover(tmp_path / "p3.png"))), "computed in the photo's own space"


def test_srgb_on_request_and_backgrounds_in_the_photos_space(remover, tmp_path):
    path = tmp_path / "p3.png"
    Image.new("RGB", (64, 64), (234, 51, 35)).save(path, icc_profile=matrix_profile())  # sRGB red in Display P3
    converted = remover(path, srgb=True, refine_foreground=False)
    assert "icc_profile" not in converted.info
    visible = pixels(converted)[..., 3] > 0
    assert np.abs(pixels(converted)[visible][:, :3] - (255, 0, 0)).max() <= 8
    on_red = pixels(remover(path, background="red", refine_foreground=False))
    assert np.abs(on_red - (234, 51, 35)).max() <= 8, "sRGB red behind the same red"


def test_undecoded_images_base64_and_arrays_of_photos(remover, photo_path):
    encoded = photo_path.read_bytes()
    expected = pixels(remover(photo_path))
    for source in ({"bytes": encoded, "path": None}, base64.b64encode(encoded).decode(), encoded):
        assert np.array_equal(pixels(remover(source)), expected)
    photos = np.stack([np.asarray(draw(80, 60, seed)) for seed in range(3)])
    singles = [pixels(remover(Image.fromarray(photo))) for photo in photos]
    for batch in (photos, torch.from_numpy(photos).permute(0, 3, 1, 2)):
        results = remover(batch)
        assert isinstance(results, list) and len(results) == 3
        assert all(np.array_equal(pixels(result), single) for result, single in zip(results, singles, strict=True))
