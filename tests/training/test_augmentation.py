"""`birefnet.training.augmentation`: geometry of photo and mask, colours compared with Pillow, probabilities."""

import pytest
import torch
from PIL import Image, ImageEnhance


pytest.importorskip("kornia")

from birefnet.training.augmentation import (
    AugmentationSettings,
    add_noise,
    augment_batch,
    change_colors,
    move_randomly,
    replace_background,
    resize_batch,
    size_before_crop,
)


UNIT = (1.0, 1.0)
STILL = {"flip": 0.0, "rotate": 0.0, "noise": 0.0, **dict.fromkeys(
    ("brightness", "contrast", "saturation", "sharpness"), UNIT)}  # fmt: skip


def random_batch(count=3, height=32, width=48):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, height, width, generator=generator)
    return images, torch.rand(count, 1, height, width, generator=generator)


def smooth_batch(count, side=64):
    """Photos whose first channel is their mask: a disc off the centre, so each rotation moves it."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    disc = ((side / 5 - (rows - side * 0.4).hypot(columns - side * 0.3)) / 4).sigmoid()
    masks = disc.expand(count, 1, side, side).clone()
    return torch.cat([masks, torch.rand(count, 2, side, side)], dim=1), masks


def test_nothing_asked_changes_nothing():
    images, masks = random_batch()
    moved, moved_masks = augment_batch(images, masks, (32, 48), AugmentationSettings(**STILL))
    torch.testing.assert_close(moved, images, atol=2e-5, rtol=0)
    torch.testing.assert_close(moved_masks, masks, atol=2e-5, rtol=0)


def test_flip_is_exact():
    images, masks = random_batch()
    moved, moved_masks = augment_batch(images, masks, (32, 48), AugmentationSettings(**{**STILL, "flip": 1.0}))
    torch.testing.assert_close(moved, images.flip(-1), atol=2e-5, rtol=0)
    torch.testing.assert_close(moved_masks, masks.flip(-1), atol=2e-5, rtol=0)


def test_photo_and_mask_move_together_and_pairs_differ():
    images, masks = smooth_batch(8)
    settings = AugmentationSettings(**{**STILL, "flip": 0.5, "rotate": 1.0, "crop": 0.6})
    torch.manual_seed(0)
    moved, moved_masks = augment_batch(images, masks, (64, 64), settings)
    assert torch.equal(moved[:, :1], moved_masks)
    differences = (moved_masks[:, None] - moved_masks[None]).abs().amax((2, 3, 4))
    assert (differences + torch.eye(8) > 0.1).all()
    assert moved_masks.min() >= 0 and moved_masks.max() <= 1


def test_rotation_turns_about_the_middle_by_at_most_the_angle():
    images, masks = smooth_batch(64)
    settings = AugmentationSettings(**{**STILL, "rotate": 1.0, "rotation_degrees": 30.0})
    torch.manual_seed(0)
    moved = move_randomly(torch.cat([images, masks], dim=1), (64, 64), settings)[:, 3]
    rows, columns = (torch.arange(64.0) - 31.5 for _ in range(2))

    def angles(maps):
        total = maps.sum((-2, -1))
        return torch.atan2((maps.sum(-1) * rows).sum(-1) / total, (maps.sum(-2) * columns).sum(-1) / total).rad2deg()

    turned = (angles(moved) - angles(masks[:, 0]) + 180) % 360 - 180
    assert turned.abs().max() <= 30.5
    assert turned.min() < -20 and turned.max() > 20


@pytest.mark.parametrize("crop", [0.5, 0.8])
def test_crop_lies_inside_the_photo_and_keeps_its_share(crop):
    side = 60
    ramp = torch.linspace(0, 1, side)
    images = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side)])
    images = images.expand(200, -1, -1, -1)
    torch.manual_seed(0)
    settings = AugmentationSettings(**{**STILL, "crop": crop})
    moved = move_randomly(torch.cat([images, images[:, :1]], dim=1), (side, side), settings)
    for channel, dimension in ((0, -1), (1, -2)):
        along = moved[:, channel].mean(dim=-2 if dimension == -1 else -1)
        assert (along.diff() > 0).all()  # No reflection is visible: crops stay inside the photo.
        kept = along[:, -1] - along[:, 0]
        assert crop - 0.03 < kept.min() < crop + 0.05 and kept.max() > 0.95


def test_any_size_comes_in_and_the_asked_size_goes_out():
    images, masks = random_batch(height=50, width=70)
    moved, moved_masks = augment_batch(images, masks, (64, 32), AugmentationSettings(crop=0.7, background=1.0))
    assert moved.shape == (3, 3, 64, 32) and moved_masks.shape == (3, 1, 64, 32)
    for result in (moved, moved_masks):
        assert result.min() >= 0 and result.max() <= 1


def test_size_before_crop_is_the_geometric_middle():
    assert size_before_crop((256, 512), 1.0) == (256, 512)
    assert size_before_crop((256, 512), 0.64) == (320, 640)


def test_resizing_is_antialiased_and_idle_at_the_right_size():
    pixels = torch.zeros(1, 1, 8, 8)
    pixels[..., ::2] = 1
    assert resize_batch(pixels, (8, 8)) is pixels
    torch.testing.assert_close(resize_batch(pixels, (2, 2)), torch.full((1, 1, 2, 2), 0.5), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("setting", "enhancer"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
        ("sharpness", ImageEnhance.Sharpness),
    ],
)
@pytest.mark.parametrize("factor", [0.4, 1.7])
def test_colors_are_those_of_pillow(setting, enhancer, factor):
    pixels = torch.randint(0, 256, (1, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changed = change_colors(pixels / 255, AugmentationSettings(**{**STILL, setting: (factor, factor)}))
    picture = enhancer(Image.fromarray(pixels[0].permute(1, 2, 0).numpy())).enhance(factor)
    expected = torch.tensor(list(picture.tobytes())).view(20, 24, 3).permute(2, 0, 1)
    # Pillow rounds the result to 8 bits, and also the mean and the blurred picture.
    assert (changed[0] * 255 - expected).abs().max() <= 2.5


def test_colors_of_each_photo_get_their_own_factor():
    images = torch.full((6, 3, 8, 8), 0.3)
    torch.manual_seed(0)
    changed = change_colors(images, AugmentationSettings(**{**STILL, "brightness": (0.5, 1.5)}))
    levels = changed.mean((1, 2, 3)) / 0.3
    assert len(levels.unique()) == 6 and levels.min() >= 0.5 and levels.max() <= 1.5


def test_noise_hits_its_share_black_and_white_alike():
    torch.manual_seed(0)
    images = torch.full((2, 3, 400, 400), 0.5)
    noisy = add_noise(images, 0.01)
    black, white = ((noisy == value).all(1).float().mean().item() for value in (0.0, 1.0))
    assert black == pytest.approx(0.005, rel=0.15) and white == pytest.approx(0.005, rel=0.15)
    assert add_noise(images, 0.0) is images


def test_background_is_one_color_composited_through_the_mask():
    images, masks = random_batch(count=40)
    masks[..., :10] = 0
    masks[..., 40:] = 1
    torch.manual_seed(0)
    changed = replace_background(images, masks, 1.0)
    color = changed[..., :1, :1]
    torch.testing.assert_close(changed[..., :10], color.expand(-1, -1, 32, 10))
    torch.testing.assert_close(changed, images * masks + color * (1 - masks))
    gray = (color - color[:, :1]).abs().amax((1, 2, 3)) < 1e-6
    assert 0.2 < gray.float().mean() < 0.6
    assert torch.equal(replace_background(images, masks, 0.0), images)


def test_random_numbers_come_from_the_generator_that_checkpoints_hold():
    images, masks = random_batch()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment_batch(images, masks, (32, 48), AugmentationSettings(crop=0.8, background=0.5))[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize(("name", "value"), [("flip", 1.5), ("noise", -0.1), ("crop", 0.0), ("crop", 1.2)])
def test_impossible_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        AugmentationSettings(**{name: value})
