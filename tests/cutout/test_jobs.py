"""birefnet.cutout.jobs: output files are assigned before any work."""

import os
from pathlib import Path

import pytest
from PIL import Image

from birefnet.command_line import build_parser
from birefnet.cutout.jobs import plan_jobs
from birefnet.errors import UsageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*names):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(name)


def plan(*arguments):
    """The outputs and the reports of planning, both by input."""
    jobs, reports = plan_jobs(build_parser("cutout").parse_args(["cutout", *arguments]))
    outputs = {job.source.name: None if job.output is None else str(job.output) for job in jobs}
    return outputs, {report.input: report for report in reports}


def test_results_go_beside_the_photos_by_default(folder):
    make("a.jpg", "in/b.jpg")
    assert plan("a.jpg", "in")[0] == {"a.jpg": "a-cutout.png", "in/b.jpg": "in/b-cutout.png"}
    assert plan("a.jpg", "--mask", "--format", "webp")[0] == {"a.jpg": "a-mask.webp"}


def test_a_second_run_does_not_take_results_for_photos(folder):
    make("in/b.jpg", "in/b-cutout.png", "in/my-cutout.png")
    outputs, reports = plan("in")
    assert outputs == {"in/my-cutout.png": "in/my-cutout-cutout.png"}, "it is no result: there is no my.jpg"
    assert list(reports) == ["in/b.jpg"] and reports["in/b.jpg"].kept


def test_a_folder_keeps_its_structure(folder):
    make("in/a.jpg", "in/deep/er/b.tif")
    expected = {"in/a.jpg": "out/a.png", "in/deep/er/b.tif": "out/deep/er/b.png"}
    assert plan("in", "-o", "out")[0] == expected


def test_what_leads_to_no_photo_is_reported_and_the_rest_goes_on(folder):
    make("a.jpg")
    Path("empty").mkdir()
    outputs, reports = plan("a.jpg", "*.tif", "empty")
    assert list(outputs) == ["a.jpg"]
    assert "no photo matches" in reports["*.tif"].error and "no photo in this folder" in reports["empty"].error


def test_an_output_folder_inside_the_searched_one_is_left_out(folder):
    make("in/a.jpg", "in/out/a.png")
    outputs, reports = plan("in", "-o", "in/out", "--overwrite")
    assert outputs == {"in/a.jpg": "in/out/a.png"} and not reports


@pytest.mark.parametrize(
    ("output", "result"), [("x.png", "x.png"), ("x.webp", "x.webp"), ("new.d", "new.d/a.png"), ("x/", "x/a.png")]
)
def test_an_output_with_a_picture_suffix_is_a_file(folder, output, result):
    make("a.jpg")
    assert plan("a.jpg", "-o", output)[0] == {"a.jpg": result}


def test_existing_results_are_kept_by_default(folder):
    make("a.jpg", "out/a.png")
    outputs, reports = plan("a.jpg", "-o", "out")
    assert not outputs and reports["a.jpg"].kept and reports["a.jpg"].error is None
    assert plan("a.jpg", "-o", "out", "--overwrite")[0] == {"a.jpg": "out/a.png"}


def test_a_photo_is_never_overwritten(folder):
    make("a.png", "a.jpg", "other/c.png")
    os.link("other/c.png", "linked.png")
    for arguments in (["a.png", "-o", "."], ["a.jpg", "a.png", "-o", "."], ["other/c.png", "-o", "linked.png"]):
        outputs, reports = plan(*arguments, "--overwrite")
        assert not outputs
        assert any("would overwrite the photo" in report.error for report in reports.values())


def test_the_background_picture_is_not_overwritten_either(folder):
    make("b.jpg", "beach.png")
    outputs, reports = plan("b.jpg", "-o", "beach.png", "--background", "beach.png", "--overwrite")
    assert not outputs and "would overwrite the photo" in reports["b.jpg"].error


def test_two_photos_with_one_result_are_detected(folder):
    make("a.jpg", "a.png", "in/a.jpg")
    outputs, reports = plan("a.jpg", "a.png", "in/a.jpg", "-o", "out")
    assert outputs == {"a.jpg": "out/a.png"}
    assert (
        reports["a.png"].error
        == reports["in/a.jpg"].error
        == "its result out/a.png would overwrite the result of a.jpg"
    )


def test_standard_input_and_output(folder):
    assert plan("-") == ({"-": None}, {})
    assert plan("-", "-o", "out.png")[0] == {"-": "out.png"}
    assert plan("-", "-o", "out")[0] == {"-": "out/stdin.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jpg", "b.jpg", "-o", "x.png"], "is one file, but there are 2 photos"),
        (["a.jpg", "b.jpg", "-o", "-"], "is one file, but there are 2 photos"),
        (["a.jpg", "-o", "x.png", "--format", "webp"], "contradict"),
        (["a.jpg", "-o", "x.jpg"], "no transparency"),
        (["a.jpg", "--format", "jpeg"], "no transparency"),
        (["-", "--json"], "cannot both use standard output"),
        (["-", "a.jpg"], "name a folder"),
    ],
)
def test_impossible_outputs_are_usage_errors(folder, arguments, message):
    make("a.jpg", "b.jpg")
    with pytest.raises(UsageError, match=message):
        plan(*arguments)
