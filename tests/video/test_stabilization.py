import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("av", reason="the extra `video` is not installed")
pytest.importorskip("cv2", reason="the extra `video` is not installed")

from birefnet.video.stabilization import Stabilizer, flow_consistency

from ..drawn_clips import picture


SIZE = (96, 128)


def true_matte(number: int, speed: float) -> np.ndarray:
    height, width = SIZE
    rows, columns = np.mgrid[:height, :width]
    return ((columns - 12 - speed * number) ** 2 + (rows - height / 2) ** 2 < 90).astype(np.float32)


def steadied(mattes: list[np.ndarray], speed: float) -> list[np.ndarray]:
    stabilizer = Stabilizer()
    photos = [Image.fromarray(picture(number, SIZE[1], SIZE[0], speed)) for number in range(len(mattes))]
    logits = [torch.from_numpy(matte).clamp(1e-4, 1 - 1e-4).logit()[None, None] for matte in mattes]
    results = [stabilizer.step(*pair) for pair in zip(logits, photos, strict=True)]
    assert [result is None for result in results[:4]] == [True, True, True, False]  # three frames late, no more
    return [result[0, 0].sigmoid().numpy() for result in [*results[3:], *stabilizer.finish()]]


def test_flicker_is_less_than_half_and_the_error_is_smaller():
    random = np.random.default_rng(0)
    true = [true_matte(number, 1.5) for number in range(12)]
    noisy = [(matte + random.normal(0, 0.15, SIZE)).clip(0, 1).astype(np.float32) for matte in true]
    steady = steadied(noisy, 1.5)

    def flicker(mattes):
        changes = [mattes[i] - mattes[i - 1] - (true[i] - true[i - 1]) for i in range(4, 12)]
        return np.sqrt(np.square(changes).mean())

    def error(mattes):
        return np.sqrt(np.square(np.stack(mattes) - np.stack(true)).mean())

    assert flicker(steady) < 0.5 * flicker(noisy)
    assert error(steady) < 0.8 * error(noisy)


@pytest.mark.parametrize("speed", [9, 25])
def test_nothing_trails_behind_a_fast_subject(speed):
    true = [true_matte(number, speed) for number in range(4)]
    steady = steadied(true, speed)
    for number in (1, 2, 3):
        left_behind = (true[number - 1] == 1) & (true[number] == 0)
        assert left_behind.any() and steady[number][left_behind].mean() < 0.05
        assert steady[number][true[number] == 1].mean() > 0.9  # and the subject itself is there at once


def test_state_goes_on_exactly():
    mattes = [np.roll(true_matte(number, 2), number, 0) for number in range(9)]
    photos = [Image.fromarray(picture(number, SIZE[1], SIZE[0], 2)) for number in range(9)]
    logits = [torch.from_numpy(matte).clamp(0.01, 0.99).logit()[None, None] for matte in mattes]
    whole, resumed = Stabilizer(), Stabilizer()
    results = []
    for number in range(9):
        results.append(whole.step(logits[number], photos[number]))
        if number == 2:
            resumed.restore({name: values.copy() for name, values in whole.state().items()})
    expected = [*results[3:], *whole.finish()]  # of all nine frames
    again = [resumed.step(logits[number], photos[number]) for number in range(3, 9)]
    again = [*again[3:], *resumed.finish()]  # of the last six
    for result, same in zip(again, expected[3:], strict=True):
        assert torch.equal(result, same)


def test_without_strength_every_matte_stays():
    true = [true_matte(number, 2) for number in range(3)]
    stabilizer = Stabilizer(strength=0)
    for number, matte in enumerate(true):
        photo = Image.fromarray(picture(number, SIZE[1], SIZE[0], 2))
        stabilizer.step(torch.from_numpy(matte).clamp(0.01, 0.99).logit()[None, None], photo)
    for result, matte in zip(stabilizer.finish(), true, strict=True):
        assert np.allclose(result[0, 0].sigmoid().numpy(), matte.clip(0.01, 0.99), atol=1e-5)


def test_flow_that_is_not_undone_counts_nothing():
    flow = np.full((8, 8, 2), 3, np.float32)
    places = np.stack(np.meshgrid(np.arange(8), np.arange(8)), -1).astype(np.float32) + flow
    inside = np.zeros((8, 8), bool)
    inside[:5, :5] = True  # three pixels further is still in the picture
    assert np.array_equal(flow_consistency(flow, -flow, places), inside.astype(np.float32))
    assert flow_consistency(flow, flow, places).max() < 1e-9


def test_arguments_outside_their_range_are_refused():
    with pytest.raises(ValueError, match="from 0 to below 1"):
        Stabilizer(1.0)
    with pytest.raises(ValueError, match="0 or more"):
        Stabilizer(ahead=-1)
