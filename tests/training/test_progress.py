"""`birefnet.training.progress`: the report of a training in numbers, words and pictures."""

import logging
from types import SimpleNamespace

import pytest
import torch
from PIL import Image


pytest.importorskip("accelerate")

from transformers import TrainerControl, TrainerState

from birefnet.training.progress import (
    TITLE_HEIGHT,
    SampleMattes,
    ValidationWatch,
    course_of,
    draw_curve,
    results,
    verdict,
)


def state_of(*errors, ious=None, first=0):
    """The state after validations with these errors. The first validation is at epoch `first`."""
    ious = ious or [1 - 2 * error for error in errors]
    history = [
        {"step": 5 * (first + row), "epoch": float(first + row), "eval_mae": error, "eval_iou": iou}
        for row, (error, iou) in enumerate(zip(errors, ious, strict=True))
    ]
    history += [{"step": step, "epoch": step / 5, "loss": 10 / step} for step in range(1, 5)]
    return TrainerState(log_history=history, num_train_epochs=10, global_step=5 * (first + len(errors) - 1))


def test_improvement_is_told_with_its_numbers():
    course = course_of(state_of(0.04, 0.05, 0.02, 0.03))
    text = verdict(course, 7)
    assert text.startswith("Improved") and "from 0.0400 to 0.0200" in text and "epoch 2 of 10" in text
    assert "7 validation photos" in text and "more epochs" not in text
    measured = results(course)
    assert (measured["mae_before"], measured["mae"], measured["mae_last"]) == (0.04, 0.02, 0.03)
    assert measured["iou"] == pytest.approx(0.96)


def test_more_epochs_are_suggested_when_the_last_was_the_best():
    assert "more epochs may" in verdict(course_of(state_of(0.04, 0.03, 0.02)), 7)


def test_a_model_that_finds_nothing_is_not_better():
    """Small subjects: a matte of zeros has a low MAE. The epoch with an IoU is kept."""
    course = course_of(state_of(0.04, 0.02, 0.03, ious=[0.6, 0.0, 0.65]))
    assert course.best.epoch == 2 and "alone" not in verdict(course, 7)
    assert verdict(course_of(state_of(0.04, 0.02, ious=[0.6, 0.0])), 7).startswith("Not improved")


def test_the_measure_that_got_worse_is_named():
    assert "IoU alone got worse" in verdict(course_of(state_of(0.24, 0.03, ious=[0.6, 0.59])), 7)
    assert "MAE alone got worse" in verdict(course_of(state_of(0.03, 0.04, ious=[0.6, 0.8])), 7)


def test_no_improvement_is_told_with_advice():
    text = verdict(course_of(state_of(0.04, 0.05, 0.09)), 1)
    assert text.startswith("Not improved") and "0.0400" in text and "0.0500" in text
    assert "stopped, because the error doubled" in text


def test_photos_learned_by_heart_are_named_as_the_reason():
    """The training loss of `state_of` falls from 10 to 2.5."""
    text = verdict(course_of(state_of(0.04, 0.05)), 4)
    assert text.startswith("Not improved") and "fell from 10 to 2.5" in text and "more variety" in text
    state = state_of(0.04, 0.05)
    state.log_history = [{**entry, "loss": 9.0} if "loss" in entry else entry for entry in state.log_history]
    assert "masks are the most frequent cause" in verdict(course_of(state), 4)
    assert "by heart" not in verdict(course_of(state_of(0.04, 0.03, 0.05)), 4)


def test_new_networks_and_missing_validation():
    assert "epoch 2" in verdict(course_of(state_of(0.3, 0.2, first=1)), 5)
    assert course_of(state_of(0.3, first=1)).before is None
    assert verdict(course_of(TrainerState()), 0).startswith("Not validated")
    assert results(course_of(TrainerState())) == {}


def watch(*errors):
    control = TrainerControl()
    for count in range(1, len(errors) + 1):
        ValidationWatch().on_evaluate(None, state_of(*errors[:count]), control)
    return control.should_training_stop


def test_three_worse_epochs_warn_once_and_go_on(caplog):
    with caplog.at_level(logging.WARNING):
        assert not watch(0.04, 0.05, 0.05)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert not watch(0.04, 0.05, 0.05, 0.05, 0.05)
    assert [record.getMessage().count("worse than before training for 3 epochs") for record in caplog.records] == [1]


def test_a_better_epoch_starts_the_count_again(caplog):
    with caplog.at_level(logging.WARNING):
        watch(0.04, 0.05, 0.05, 0.03, 0.05, 0.05)
    assert not caplog.records


def test_doubled_error_stops(caplog):
    with caplog.at_level(logging.WARNING):
        assert watch(0.04, 0.0801)
    assert "Stopped" in caplog.text and not watch(0.04, 0.079)


def test_a_small_dip_of_a_nearly_perfect_model_does_not_stop():
    """A Swin-T network whose error doubled in the first epochs, and which was better than before at the end."""
    ious = [0.979, 0.971, 0.944, 0.966]
    for count in range(2, 5):
        assert not course_of(state_of(*(0.0178, 0.0194, 0.0266, 0.0201)[:count], ious=ious[:count])).is_ruined


def test_curve_is_a_picture(tmp_path):
    state = state_of(0.04, 0.05, 0.02)
    draw_curve(course_of(state), state, tmp_path / "curve.png")
    picture = Image.open(tmp_path / "curve.png")
    assert picture.width > 2 * picture.height and len(picture.convert("RGB").getcolors(10**6)) > 10


@pytest.mark.parametrize(
    ("errors", "shown"), [((0.04, 0.02, 0.03), 153), ((0.01, 0.02, 0.03), 153), ((0.01, 0.03, 0.02), 230)]
)
def test_sheet_shows_photo_mask_before_and_best_epoch(tmp_path, errors, shown):
    """The mattes of each validation have another gray. The best epoch is shown even if it is not kept."""
    sample = SimpleNamespace(eval_dataset=range(2))

    def sample_matte(row):
        photo, mask = torch.full((3, 8, 8), 0.1), torch.full((3, 8, 8), 0.4)
        return torch.cat([photo, mask, torch.full((3, 8, 8), sample.gray)], dim=-1)

    sample.sample_matte = sample_matte
    for count, sample.gray in enumerate((0.2, 0.6, 0.9), start=1):
        # A new callback each time, as after an interruption.
        SampleMattes(sample, tmp_path).on_evaluate(None, state_of(*errors[:count]), None)
    sheet = SampleMattes(sample, tmp_path).sheet(course_of(state_of(*errors)))
    assert sheet.size == (4 * 8, TITLE_HEIGHT + 2 * 8)
    grays = [sheet.getpixel((8 * column + 4, TITLE_HEIGHT + 12))[0] for column in range(4)]
    assert grays == [26, 102, 51, shown]
