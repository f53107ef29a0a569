"""Foreground colours, matte edits and compositing."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from birefnet.repository import matting_birefnet
from birefnet.repository.matting_birefnet import (
    adjust_matte,
    cut_out,
    estimate_foreground,
    guided_upsampling,
    sharpened_matte,
)


def random_photo(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_photo(height, width, seed=0):
    """Bytes (3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def draw_disc(height, width, softness):
    """A matte (1, H, W) that is exactly 0 and 1 but for an edge of so many pixels."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = torch.hypot(rows - 0.45 * height, columns - 0.3 * width)
    return ((0.25 * height - distance) / softness + 0.5).clamp(0, 1)[None]


def slow_box_mean(image, box):
    """Window by window, over an image that is mirrored pixel by pixel: image (H, W)."""

    def mirrored(index, size):
        while not 0 <= index < size:
            index = -index if index < 0 else 2 * (size - 1) - index
        return index

    height, width = image.shape
    window = range(-(box // 2), box - box // 2)
    rows = [[mirrored(row + step, height) if height > 1 else 0 for step in window] for row in range(height)]
    columns = [[mirrored(column + step, width) if width > 1 else 0 for step in window] for column in range(width)]
    return np.array([[image[np.ix_(row, column)].mean() for column in columns] for row in rows])


def slow_foreground(image, alpha, boxes=(90, 6)):
    """The formulas of blur fusion, as they are written down."""
    image, alpha = image.double().numpy(), alpha.double().numpy()[0]
    foreground, background = image.copy(), image.copy()
    for box in boxes:
        alpha_mean = slow_box_mean(alpha, box)
        for channel in range(3):
            f = slow_box_mean(foreground[channel] * alpha, box) / (alpha_mean + 1e-5)
            b = slow_box_mean(background[channel] * (1 - alpha), box) / (1 - alpha_mean + 1e-5)
            foreground[channel] = np.clip(f + alpha * (image[channel] - alpha * f - (1 - alpha) * b), 0, 1)
            background[channel] = b
    return torch.from_numpy(foreground).float()


def test_foreground_equals_the_published_estimator():
    reference = np.load(Path(__file__).parent / "fixtures" / "foreground.npz")
    foreground = estimate_foreground(torch.from_numpy(reference["image"]), torch.from_numpy(reference["alpha"]))
    rows, columns = [*range(0, 240, 4), 239], [*range(0, 320, 4), 319]  # what the file keeps: the borders included
    difference = foreground.numpy()[:, rows][:, :, columns] - reference["foreground"]
    assert np.abs(difference).max() < 0.05 / 255


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (2, 3), (13, 11), (100, 5)])
@pytest.mark.parametrize("boxes", [(90, 6), (5,), (1,)])
def test_foreground_of_photos_smaller_than_the_box(size, boxes):
    image, alpha = random_photo(3, *size), random_photo(1, *size, seed=1)
    expected = slow_foreground(image, alpha, boxes)
    torch.testing.assert_close(estimate_foreground(image, alpha, boxes), expected, atol=1e-5, rtol=0)


def test_foreground_in_tiles_equals_the_foreground_in_one_piece(monkeypatch):
    image, alpha = random_photo(2, 3, 150, 20), random_photo(2, 1, 150, 20, seed=1)
    whole = estimate_foreground(image, alpha, (9, 4))
    monkeypatch.setitem(estimate_foreground.__globals__, "_TILE_SIDE", 1)
    torch.testing.assert_close(estimate_foreground(image, alpha, (9, 4)), whole, atol=1e-6, rtol=0)


def test_foreground_takes_hardly_longer_for_larger_boxes():
    image, alpha = random_photo(3, 400, 400), random_photo(1, 400, 400, seed=1)

    def seconds(box):
        start = time.process_time()
        estimate_foreground(image, alpha, (box,))
        return time.process_time() - start

    assert min(seconds(160) for _ in range(5)) < 8 * min(seconds(4) for _ in range(5))  # window by window: 1600 times


def test_foreground_is_exact_where_the_matte_is_almost_zero():
    image, alpha = random_photo(3, 30, 40), 1e-5 * random_photo(1, 30, 40, seed=1)
    alpha[:, :8, :8] = 1  # small sums after large ones: float32 cumulative sums would lose them
    torch.testing.assert_close(estimate_foreground(image, alpha), slow_foreground(image, alpha), atol=1e-4, rtol=0)


def test_foreground_removes_the_old_background():
    alpha = torch.linspace(-9, 10, 200).clamp(0, 1).expand(1, 200, 200)  # an edge ten pixels wide
    subject, background = (torch.tensor(colour).view(3, 1, 1) for colour in ([0.9, 0.2, 0.1], [0.1, 0.3, 0.8]))
    image = alpha * subject + (1 - alpha) * background
    edge = ((alpha > 0.1) & (alpha < 0.9)).expand(3, -1, -1)
    before, after = ((colours - subject).abs()[edge].mean() for colours in (image, estimate_foreground(image, alpha)))
    assert after < before / 10


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_foreground_keeps_dtype_and_leading_dimensions(dtype):
    image, alpha = random_photo(2, 2, 3, 12, 10).to(dtype), random_photo(2, 2, 1, 12, 10, seed=1).to(dtype)
    kept = image.clone()
    foreground = estimate_foreground(image, alpha)
    assert foreground.shape == image.shape
    assert foreground.dtype == dtype
    assert torch.equal(image, kept)
    alone = estimate_foreground(image[1, 0], alpha[1, 0])
    torch.testing.assert_close(foreground[1, 0], alone)


def test_foreground_gradient():
    image = (0.2 + 0.6 * random_photo(3, 5, 4, dtype=torch.float64)).requires_grad_()
    alpha = (0.2 + 0.6 * random_photo(1, 5, 4, seed=1, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, a: estimate_foreground(i, a, (3, 2)), (image, alpha))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4)), TypeError, "uint8"),
        ((np.zeros((3, 4, 4)), torch.zeros(1, 4, 4)), TypeError, "ndarray"),
        ((torch.full((3, 4, 4), 255.0), torch.zeros(1, 4, 4)), ValueError, "from 255 to 255"),
        ((torch.zeros(3, 4, 4), torch.full((1, 4, 4), float("nan"))), ValueError, "nan"),
        ((torch.zeros(4, 4, 4), torch.zeros(1, 4, 4)), ValueError, r"\(4, 4, 4\)"),
        ((torch.zeros(3, 4, 4), torch.zeros(1, 4, 5)), ValueError, r"\(1, 4, 4\).*\(1, 4, 5\)"),
        ((torch.zeros(3, 0, 4), torch.zeros(1, 0, 4)), ValueError, "empty"),
        ((torch.zeros(3, 4, 4), torch.zeros(1, 4, 4), (0,)), ValueError, "box_sizes"),
        ((torch.zeros(3, 4, 4), torch.zeros(1, 4, 4), ()), ValueError, "box_sizes"),
    ],
)
def test_foreground_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        estimate_foreground(*arguments)


def slow_guided_upsampling(matte, small_photo, photo, radius, epsilon):
    """Window by window, each a least-squares fit of the matte by colour in float64."""
    height, width = matte.shape
    windows = [
        [(slice(max(y - radius, 0), y + radius + 1), slice(max(x - radius, 0), x + radius + 1)) for x in range(width)]
        for y in range(height)
    ]
    functions = np.empty((4, height, width))
    for y, x in np.ndindex(height, width):
        colours = small_photo[(slice(None), *windows[y][x])].reshape(3, -1)
        values = matte[windows[y][x]].ravel()
        covariance = np.cov(colours, bias=True) + epsilon * np.eye(3)
        slopes = np.linalg.solve(covariance, (colours * values).mean(1) - colours.mean(1) * values.mean())
        functions[:, y, x] = [*slopes, values.mean() - slopes @ colours.mean(1)]
    smooth = np.array([[functions[(slice(None), *window)].mean((1, 2)) for window in line] for line in windows])
    planes = [Image.fromarray(plane.astype(np.float32)) for plane in smooth.transpose(2, 0, 1)]
    large = np.array([np.array(plane.resize(photo.shape[:0:-1], Image.Resampling.BILINEAR)) for plane in planes])
    return ((large[:3] * photo).sum(0) + large[3]).clip(0, 1)


@pytest.mark.parametrize(("radius", "epsilon"), [(2, 1e-4), (1, 1e-2)])
def test_guided_upsampling_equals_a_fit_in_every_window(radius, epsilon, monkeypatch):
    monkeypatch.setattr(
        "birefnet.repository.matting_birefnet._PIXELS_PER_BAND", 200
    )  # several bands; the last one is shorter
    photo = draw_photo(47, 61)
    small = torch.from_numpy(
        np.array(Image.fromarray(photo.permute(1, 2, 0).numpy()).resize((20, 16), Image.Resampling.BILINEAR))
    ).permute(2, 0, 1)
    matte = torch.from_numpy(np.array(Image.fromarray(draw_disc(47, 61, 4)[0].numpy()).resize((20, 16))))
    expected = slow_guided_upsampling(
        matte.double().numpy(), small.numpy() / 255, photo.numpy() / 255, radius, epsilon
    )
    guided = guided_upsampling(matte, small, photo, radius, epsilon)
    assert guided.dtype == torch.float32 and guided.shape == (47, 61)
    assert np.abs(guided.numpy() - expected).max() < 1e-4


def test_guided_upsampling_follows_the_photos_edge():
    """A dark disc on a bright background. Its matte, eight times smaller, is restored almost exactly."""
    inside = draw_disc(256, 256, softness=1) > 0.5
    photo = torch.where(inside, torch.tensor([40, 60, 30]).view(3, 1, 1), 220).byte()
    small = torch.nn.functional.interpolate(photo[None].float(), size=(32, 32), mode="bilinear", antialias=True)[0]
    matte = torch.nn.functional.interpolate(inside[None].float(), size=(32, 32), mode="bilinear", antialias=True)[0, 0]
    plain = torch.nn.functional.interpolate(matte[None, None], size=(256, 256), mode="bilinear")[0, 0]
    guided = guided_upsampling(matte, small.round().byte(), photo)
    errors = [(alpha - inside[0].float()).abs().mean().item() for alpha in (guided, plain)]
    assert errors[0] < errors[1] / 4


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("photo", [draw_photo(40, 50), torch.full((3, 40, 50), 77, dtype=torch.uint8)])
def test_guided_upsampling_keeps_constant_mattes(value, photo):
    small = photo[:, ::5, ::5].contiguous()
    guided = guided_upsampling(torch.full((8, 10), value), small, photo)
    assert (guided - value).abs().max() < 1e-4


def test_guided_upsampling_refuses_a_photo_of_another_size():
    with pytest.raises(ValueError, match=r"\(8, 10\), got \(8, 8\)"):
        guided_upsampling(torch.zeros(8, 10), draw_photo(8, 8), draw_photo(16, 20))


def slow_sharpened_matte(matte, photo, radius, epsilon):
    """Window by window in float64: a least-squares fit, scaled until foreground and background differ by 1."""
    functions, confidences = np.empty((4, *matte.shape)), np.empty(matte.shape)
    windows = {
        (y, x): (slice(max(y - radius, 0), y + radius + 1), slice(max(x - radius, 0), x + radius + 1))
        for y, x in np.ndindex(matte.shape)
    }
    for place, window in windows.items():
        colours, values = photo[(slice(None), *window)].reshape(3, -1), matte[window].ravel()
        covariance = np.cov(colours, bias=True) + epsilon * np.eye(3)
        slopes = np.linalg.solve(covariance, (colours * values).mean(1) - colours.mean(1) * values.mean())
        front, back = values**2, (1 - values) ** 2
        foreground, background = ((colours * w).mean(1) / (w.mean() + 1e-6) for w in (front, back))
        middle = np.mean([(values * w).mean() / (w.mean() + 1e-6) for w in (front, back)])
        distance = slopes @ (foreground - background)
        slopes = slopes * max(distance / (distance**2 + 0.03), 1)
        functions[(slice(None), *place)] = [*slopes, middle - slopes @ (foreground + background) / 2]
        confidences[place] = min(front.mean() / 0.05, back.mean() / 0.05, 1) * np.clip(distance / 0.1, 0, 1)
    result = np.empty(matte.shape)
    for place, window in windows.items():  # each window's fit, weighted by its confidence
        *slopes, constant = (functions[(slice(None), *window)] * confidences[window]).mean((1, 2))
        result[place] = (
            slopes @ photo[(slice(None), *place)] + constant + (1 - confidences[window].mean()) * matte[place]
        )
    return result.clip(0, 1)


@pytest.mark.parametrize(("radius", "epsilon"), [(3, 1e-4), (1, 1e-2)])
def test_sharpened_matte_equals_a_scaled_fit_in_every_window(radius, epsilon):
    disc = draw_disc(24, 31, 9)
    photo = (0.7 * disc * 255 + 0.3 * draw_photo(24, 31)).byte()
    expected = slow_sharpened_matte(disc[0].double().numpy(), photo.numpy() / 255, radius, epsilon)
    assert np.abs(sharpened_matte(disc[0], photo, radius, epsilon).numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("softness", [1, 3])
def test_a_wide_edge_becomes_as_narrow_as_the_photos(softness):
    """A soft edge of the photo stays soft."""
    alpha = draw_disc(96, 96, softness)
    colours = torch.tensor([[200, 120, 40], [60, 90, 160]]).view(2, 3, 1, 1)
    photo = (alpha * colours[0] + (1 - alpha) * colours[1]).round().byte()
    wide = draw_disc(96, 96, 7)[0]
    errors = [(matte - alpha[0]).abs().sum().item() for matte in (sharpened_matte(wide, photo), wide)]
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_sharpened_matte_is_unchanged_without_edges_in_the_photo(value):
    assert (sharpened_matte(torch.full((40, 50), value), draw_photo(40, 50)) - value).abs().max() < 1e-4
    wide, gray = draw_disc(40, 50, 10)[0], torch.full((3, 40, 50), 77, dtype=torch.uint8)
    assert (sharpened_matte(wide, gray) - wide).abs().max() < 1e-4


def test_tiles_leave_no_trace(monkeypatch):
    """Certain tiles are skipped: all but the disc's are within 0.003 of 0 or 1, like a network's mattes."""
    disc = draw_disc(150, 170, 9)
    photo = (0.7 * disc * 255 + 0.3 * draw_photo(150, 170)).byte()
    matte = disc[0] * 0.996 + 0.002
    small_tiles = sharpened_matte(matte, photo), guided_upsampling(matte, photo, photo)
    monkeypatch.setattr(matting_birefnet, "_TILE_SIDE", 1000)
    whole = sharpened_matte(matte, photo), guided_upsampling(matte, photo, photo)
    for result, expected in zip(small_tiles, whole, strict=True):
        assert (result - expected).abs().max() < 2e-4  # a twentieth of a gray level


def test_sharpened_matte_refuses_a_photo_of_another_size():
    with pytest.raises(ValueError, match=r"\(8, 10\), got \(8, 8\)"):
        sharpened_matte(torch.zeros(8, 10), draw_photo(8, 8))


def test_matte_is_unchanged_without_edits():
    alpha = random_photo(1, 20, 30)
    assert torch.equal(adjust_matte(alpha), alpha)


def test_sensitivity_and_threshold_and_invert():
    alpha = torch.tensor([[0.0, 0.3, 0.5, 0.8, 1.0]])
    torch.testing.assert_close(adjust_matte(alpha, sensitivity=0.5), torch.tensor([[0.0, 0.45, 0.75, 1.0, 1.0]]))
    assert adjust_matte(alpha, threshold=0.5).tolist() == [[0, 0, 0, 1, 1]]
    assert adjust_matte(alpha, sensitivity=0, threshold=0.5).tolist() == [[0, 1, 1, 1, 1]]
    torch.testing.assert_close(adjust_matte(alpha, invert=True), 1 - alpha)


@pytest.mark.parametrize("pixels", [1, 2, 3, 4, 7, 20])
def test_grow_extends_by_the_given_pixels(pixels):
    alpha = torch.zeros(1, 61, 71)
    alpha[0, 30, 35] = 1
    grown = adjust_matte(alpha, grow=pixels)[0]
    rows, columns = torch.nonzero(grown, as_tuple=True)
    distance = torch.hypot(rows - 30.0, columns - 35.0)
    assert rows.min() == 30 - pixels
    assert rows.max() == 30 + pixels
    assert columns.min() == 35 - pixels
    assert columns.max() == 35 + pixels
    assert distance.max() <= 1.083 * pixels + 1  # an octagon, up to the pixel grid
    disc = torch.hypot(torch.arange(61).view(-1, 1) - 30.0, torch.arange(71) - 35.0) <= pixels * 0.9
    assert grown[disc].all()  # without holes


def test_shrink_is_the_growth_of_the_background():
    alpha = random_photo(2, 1, 25, 19)
    torch.testing.assert_close(adjust_matte(alpha, grow=-4), 1 - adjust_matte(1 - alpha, grow=4))
    assert torch.equal(adjust_matte(torch.ones(9, 9), grow=-3), torch.ones(9, 9))  # the frame is no edge


def test_grow_of_soft_values_is_the_maximum_in_reach():
    alpha = random_photo(1, 12, 14)
    expected = torch.nn.functional.max_pool2d(alpha[None], 3, stride=1, padding=1)[0]
    assert torch.equal(adjust_matte(alpha, grow=1), expected)


@pytest.mark.parametrize("deviation", [0.4, 1, 2.5, 8])
def test_feather_is_a_blur_of_the_given_standard_deviation(deviation):
    alpha = torch.zeros(101, 101, dtype=torch.float64)
    alpha[50, 50] = 1
    blurred = adjust_matte(alpha, feather=deviation)
    offset = torch.arange(101, dtype=torch.float64) - 50
    assert blurred.sum().item() == pytest.approx(1)
    for dimension in (0, 1):
        assert (blurred.sum(dimension) * offset**2).sum().item() == pytest.approx(deviation**2)


def test_feather_keeps_constant_mattes_and_the_range():
    assert torch.allclose(adjust_matte(torch.ones(1, 5, 6), feather=10), torch.ones(1, 5, 6))
    feathered = adjust_matte((random_photo(1, 30, 40) > 0.5).float(), feather=3)
    assert feathered.min() >= 0
    assert feathered.max() <= 1


def test_adjust_matte_gradient():
    alpha = (0.1 + 0.3 * random_photo(1, 6, 5, dtype=torch.float64)).requires_grad_()
    edit = {"sensitivity": 0.5, "grow": 1, "feather": 1.3, "invert": True}
    assert torch.autograd.gradcheck(lambda a: adjust_matte(a, **edit), (alpha,))


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        ({"threshold": 1.5}, ValueError, "threshold.*1.5"),
        ({"sensitivity": -1}, ValueError, "sensitivity.*-1"),
        ({"grow": 1.5}, TypeError, "grow.*1.5"),
        ({"feather": -2}, ValueError, "feather.*-2"),
        ({"feather": float("inf")}, ValueError, "feather.*inf"),
    ],
)
def test_adjust_matte_refuses(edit, error, message):
    with pytest.raises(error, match=message):
        adjust_matte(torch.zeros(4, 4), **edit)


def test_adjust_matte_refuses_bytes_and_lines():
    with pytest.raises(TypeError, match="uint8"):
        adjust_matte(torch.zeros(4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="height, width"):
        adjust_matte(torch.zeros(4))


@pytest.mark.parametrize("softness", [1, 12])
@pytest.mark.parametrize("tile_side", [16, 128])
def test_cut_out_has_the_estimated_colours_where_visible(softness, tile_side, monkeypatch):
    monkeypatch.setitem(cut_out.__globals__, "_TILE_SIDE", tile_side)
    photo, alpha = draw_photo(330, 410), draw_disc(330, 410, softness)
    result = cut_out(photo, alpha)
    assert result.dtype == torch.uint8 and result.shape == (4, 330, 410)
    assert torch.equal(result[3:], (alpha * 255).round().to(torch.uint8))
    visible = (result[3] > 0).expand(3, -1, -1)
    difference = result[:3] - 255 * estimate_foreground(photo / 255, alpha)
    assert difference[visible].abs().max() <= 0.5 + 0.05  # the rounding to bytes, and the tolerance of the colours
    assert torch.equal(result[:3][(alpha == 1).expand(3, -1, -1)], photo[(alpha == 1).expand(3, -1, -1)])


def test_cut_out_computes_colours_in_few_tiles_of_a_clear_matte(monkeypatch):
    computed = []
    compute = cut_out.__globals__["_foreground_of_tile"]
    monkeypatch.setitem(
        cut_out.__globals__, "_foreground_of_tile", lambda *arguments: computed.append(1) or compute(*arguments)
    )
    monkeypatch.setitem(cut_out.__globals__, "_TILE_SIDE", 100)
    cut_out(draw_photo(1000, 1000), draw_disc(1000, 1000, 3))
    assert 10 <= len(computed) <= 30  # of 100: the circle is 1570 pixels long
    computed.clear()
    cut_out(draw_photo(300, 300), torch.ones(1, 300, 300))
    assert not computed


@pytest.mark.parametrize("background", [None, "white"])
def test_cut_out_without_refinement_keeps_the_photos_colours(background):
    photo, alpha = draw_photo(60, 50), draw_disc(60, 50, 10)
    result = cut_out(photo, alpha, background, refine_foreground=False)
    if background is None:
        assert torch.equal(result[:3], photo)
    else:
        expected = alpha * photo + (1 - alpha) * 255
        assert (result - expected).abs().max() <= 0.501


@pytest.mark.parametrize("colour", ["#ff8000", "rgb(255, 128, 0)", (255, 128, 0)])
def test_cut_out_on_a_colour(colour):
    photo, alpha = draw_photo(300, 200), draw_disc(300, 200, 10)
    foreground = 255 * estimate_foreground(photo / 255, alpha)
    expected = alpha * foreground + (1 - alpha) * torch.tensor([255.0, 128, 0]).view(3, 1, 1)
    result = cut_out(photo, alpha, colour)
    assert result.dtype == torch.uint8
    assert (result - expected).abs().max() <= 0.5 + 0.05


def test_cut_out_on_a_picture_covers_and_crops_the_middle():
    picture = Image.new("RGB", (90, 30), "black")
    picture.paste("white", (30, 0, 60, 30))  # the middle third is white
    result = cut_out(draw_photo(20, 20), torch.zeros(1, 20, 20), picture)
    assert result.shape == (3, 20, 20)
    assert result[:, :, 2:-2].eq(255).all()
    tall = cut_out(draw_photo(20, 20), torch.zeros(1, 20, 20), picture.rotate(90, expand=True))
    assert torch.equal(tall, result.transpose(-1, -2))


@pytest.mark.parametrize("size", [(1, 1), (7, 50), (33, 12)])
def test_cut_out_on_a_tensor_of_any_size(size):
    photo, alpha = draw_photo(16, 11), random_photo(1, 16, 11, seed=1)
    expected = alpha * 255 * estimate_foreground(photo / 255, alpha) + (1 - alpha) * 255 * 0.25
    assert (cut_out(photo, alpha, torch.full((3, *size), 0.25)) - expected).abs().max() <= 0.5 + 0.05


@pytest.mark.parametrize(
    ("background", "error", "message"),
    [
        ("no-such-colour", ValueError, "no-such-colour"),
        ("#ffffff80", ValueError, "three values"),
        ((1, 2), ValueError, "three values"),
        ((0, 0, 300), ValueError, "300"),
        (7, TypeError, "int"),
        (torch.zeros(4, 4), ValueError, r"\(4, 4\)"),
        (torch.full((3, 4, 4), 200.0), ValueError, "200"),
    ],
)
def test_cut_out_refuses_backgrounds(background, error, message):
    with pytest.raises(error, match=message):
        cut_out(draw_photo(4, 4), torch.zeros(1, 4, 4), background)


@pytest.mark.parametrize(
    ("photo", "alpha", "error", "message"),
    [
        (torch.zeros(3, 4, 4), torch.zeros(1, 4, 4), TypeError, "bytes.*float32"),
        (np.zeros((3, 4, 4), np.uint8), torch.zeros(1, 4, 4), TypeError, "ndarray"),
        (draw_photo(4, 4), torch.zeros(1, 4, 5), ValueError, r"\(1, 4, 4\).*\(1, 4, 5\)"),
        (draw_photo(4, 4)[None], torch.zeros(1, 1, 4, 4), ValueError, r"\(1, 3, 4, 4\)"),
        (draw_photo(4, 4), torch.full((1, 4, 4), 1.5), ValueError, "1.5"),
    ],
)
def test_cut_out_refuses(photo, alpha, error, message):
    with pytest.raises(error, match=message):
        cut_out(photo, alpha)
