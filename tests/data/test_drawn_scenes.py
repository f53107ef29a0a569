"""`birefnet draw`: reproducible pairs with exact soft masks, in the folders that training reads."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from birefnet.command_line import main
from birefnet.data import drawn_scenes
from birefnet.data.drawn_scenes import SHAPES, Part, composite, draw_scene, fill, line, move, rasterize, read_photos
from birefnet.data.pairs import decode_pair, read_pairs

from ..drawn_photos import draw_pair, write_folder


SIDE = 64


@pytest.fixture(scope="module")
def photos():
    return [draw_pair(seed, (96, 64)) for seed in range(4)]


@pytest.fixture
def photo_folder(tmp_path):
    return write_folder(tmp_path / "photos", ["a", "b", "c"])


def draw(output, photo_folder, *more):
    words = ["draw", output, "--photos", photo_folder, "--number", 3, "--side", SIDE, "--seed", 7, *more]
    return main([str(word) for word in words])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_is_one_that_training_reads(tmp_path, photo_folder):
    assert draw(tmp_path / "drawn", photo_folder) == 0
    assert {str(path) for path in contents(tmp_path / "drawn")} == {
        f"{place}/0000{number}.{ending}" for place, ending in (("im", "jpg"), ("gt", "png")) for number in range(3)
    }
    pairs = read_pairs([tmp_path / "drawn"])
    assert len(pairs) == 3
    for pair in pairs:
        photo, mask = decode_pair(pair)
        assert photo.size == mask.size == (SIDE, SIDE)


def test_the_seed_settles_every_pair_and_more_begin_with_the_fewer(tmp_path, photo_folder):
    for name, more in {"one": [], "same": [], "more": ["--number", 4], "other": ["--seed", 8]}.items():
        assert draw(tmp_path / name, photo_folder, *more) == 0
    one, same, more, other = (contents(tmp_path / name) for name in ("one", "same", "more", "other"))
    assert one == same
    assert len(more) == 8 and one.items() < more.items()
    assert all(one[path] != other[path] for path in one)


def test_any_number_can_be_drawn_alone(photos):
    in_turn = [draw_scene(photos, SIDE, 5, number) for number in range(3)]
    alone = draw_scene(photos, SIDE, 5, 2)
    assert alone == in_turn[2] and alone != in_turn[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_a_soft_mask_that_is_neither_empty_nor_full(shape):
    for seed in range(6):
        random = np.random.default_rng(seed)
        mask = np.asarray(rasterize(move(random, shape(random)), 128))
        assert ((mask > 0) & (mask < 255)).sum() > 50
        assert 0.002 < mask.mean() / 255 < 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_moved_to_a_size_and_place_in_the_picture(shape):
    for seed in range(6):
        random = np.random.default_rng(seed)
        parts = move(random, shape(random))
        margins = [0 if part.widths is None else part.widths[:, None] / 2 for part in parts]
        low = np.min([(part.points - margin).min(0) for part, margin in zip(parts, margins, strict=True)], 0)
        high = np.max([(part.points + margin).max(0) for part, margin in zip(parts, margins, strict=True)], 0)
        assert 0.35 <= (high - low).max() <= 0.95 + 1e-9
        outside = np.maximum(-low, high - 1)
        assert (outside <= 0.25 * (high - low) + 1e-9).all()
        assert (outside > 1e-9).sum() <= 1


def test_edges_are_the_true_coverage():
    left, top, right, bottom = np.array([8.25, 10, 20, 30.5]) / SIDE
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    # Pillow fills the border of a polygon too. Half a subpixel less on each side gives the exact area.
    corners += np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]) * 0.5 / 4 / SIDE
    mask = np.asarray(rasterize([fill(corners)], SIDE)).astype(float) / 255
    assert mask.sum() == pytest.approx(11.75 * 20.5, rel=0.02)
    assert mask[20, 7] == 0 and mask[20, 8] == pytest.approx(0.75, abs=0.01) and mask[20, 9] == 1
    assert mask[30, 15] == pytest.approx(0.5, abs=0.01) and mask[31, 15] == 0


@pytest.mark.parametrize("width", [0.005, 0.03])
def test_a_line_is_as_wide_as_asked(width):
    mask = np.asarray(rasterize([line([(0.2, 0.1), (0.4, 0.9)], width)], 512)) / 255
    across = mask[256].sum() / 512 * np.cos(np.arctan2(0.2, 0.8))
    assert across == pytest.approx(width, abs=0.0008)


def test_a_part_without_ink_is_a_hole():
    square = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    mask = np.asarray(rasterize([Part(square * 0.5 + 0.25), Part(square * 0.25 + 0.375, ink=False)], SIDE))
    assert mask[32, 32] == 0 and mask[20, 20] == 255 and mask[4, 4] == 0


def test_the_photo_is_the_composition_of_foreground_and_background(photos, monkeypatch):
    random = np.random.default_rng(0)
    foreground, background = random.uniform(150, 255, (SIDE, SIDE, 3)), random.uniform(0, 100, (SIDE, SIDE, 3))
    monkeypatch.setattr(drawn_scenes, "draw_texture", lambda *arguments: foreground)
    monkeypatch.setattr(drawn_scenes, "draw_background", lambda *arguments: background)
    monkeypatch.setattr(drawn_scenes, "expose", lambda random, photo, mask: (photo, mask))
    # Different brightness of the parts would change the foreground.
    monkeypatch.setattr(drawn_scenes, "SHADES", (0,))
    for number in range(5):
        photo, mask = draw_scene(photos, SIDE, 1, number)
        alpha = np.asarray(mask)[..., None] / 255
        expected = alpha * foreground + (1 - alpha) * background
        assert abs(np.asarray(photo) - expected).max() <= 0.5
    opaque = Image.new("L", (SIDE, SIDE), 255)
    np.testing.assert_array_equal(np.asarray(composite(opaque, foreground, background)), foreground.round())


def test_objects_differ_from_their_backgrounds(photos):
    """Also if each texture is the background itself, so only the brightness can differ."""
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (20, 20, 44, 44))
    tones = np.ones((SIDE, SIDE, 1))
    for grey in (0, 90, 127, 128, 200, 255):
        background = np.full((SIDE, SIDE, 3), float(grey))
        same = [(Image.new("RGB", (SIDE, SIDE), (grey,) * 3), Image.new("L", (SIDE, SIDE), 255))]
        for chosen in (photos, same):
            foreground = drawn_scenes.draw_foreground(np.random.default_rng(3), chosen, mask, tones, background)
            difference = foreground[20:44, 20:44].mean((0, 1)) - grey
            assert np.linalg.norm(difference) >= drawn_scenes.CONTRAST


def test_backgrounds_leave_the_photos_objects_out():
    mask = Image.new("L", (96, 64))
    mask.paste(255, (50, 0, 96, 64))
    for seed in range(8):
        box = drawn_scenes.find_clear_square(np.random.default_rng(seed), mask)
        assert box[2] - box[0] == box[3] - box[1] >= 0.6 * 64
        assert min(box) >= 0 and box[2] <= 96 and box[3] <= 64
        assert np.asarray(mask.crop(box)).mean() < drawn_scenes.BACKGROUND_SHARE * 255
    assert drawn_scenes.find_clear_square(np.random.default_rng(0), Image.new("L", (96, 64), 255)) is None


def test_the_pool_is_bounded_reduced_and_skips_bad_pairs(tmp_path, monkeypatch, caplog):
    folder = write_folder(tmp_path, ["a", "b", "c", "d"], size=(96, 48))
    (folder / "im" / "b.jpg").write_text("no picture")
    found = read_photos(read_pairs([folder]), SIDE, 1)
    assert len(found) == 3 and "b.jpg" in caplog.text
    assert all(photo.size == mask.size == (64, 32) for photo, mask in found)
    monkeypatch.setattr(drawn_scenes, "POOL", 2)
    assert len(read_photos(read_pairs([folder]), SIDE, 1)) == 2


def test_photos_without_a_sure_object_serve_as_well():
    photos = [(draw_pair()[0], Image.new("L", (48, 32), value)) for value in (100, 255)]
    for number in range(20):
        draw_scene(photos, SIDE, 0, number)


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path, photo_folder, capsys):
    before = contents(photo_folder)
    assert draw(photo_folder, photo_folder) == 1
    assert f"{photo_folder} exists already" in capsys.readouterr().err
    assert contents(photo_folder) == before
    file = tmp_path / "file"
    file.write_text("mine")
    assert draw(file, photo_folder) == 1
    assert file.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert draw(tmp_path / "empty", photo_folder) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--number", 0], "--number 0: at least 1"),
        (["--side", 63], "--side 63: at least 64"),
        (["--seed", -1], "--seed -1: at least 0"),
    ],
)
def test_numbers_that_cannot_be_served_are_usage_errors(tmp_path, photo_folder, capsys, words, message):
    assert draw(tmp_path / "drawn", photo_folder, *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()


def test_missing_and_unusable_photos_are_named(tmp_path, photo_folder, capsys):
    assert draw(tmp_path / "drawn", tmp_path / "nowhere") == 1
    assert "nowhere" in capsys.readouterr().err
    for path in (photo_folder / "im").iterdir():
        path.write_text("no picture")
    assert draw(tmp_path / "drawn", photo_folder) == 1
    assert "None of the 3 pairs" in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()


def test_help_waits_for_no_heavy_import():
    code = (
        "import sys; from birefnet.command_line import build_parser\n"
        "build_parser('draw').parse_args(['draw', 'drawn', '--photos', 'photos'])\n"
        "print([name for name in ('torch', 'transformers', 'tqdm') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert process.stdout == "[]\n"
