import json

import pytest

from birefnet.command_line import main


pytest.importorskip("av", reason="the extra `video` is not installed")
pytest.importorskip("cv2", reason="the extra `video` is not installed")

from ..drawn_clips import decoded, write_clip


pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_clips_of_which_one_is_bad(tmp_path, tiny_model_folder, capsys):
    good = write_clip(tmp_path / "good.mp4", 3)
    (tmp_path / "bad.mp4").write_text("no clip")
    before = good.read_bytes()
    arguments = ["video", str(tmp_path / "bad.mp4"), str(good), "-o", str(tmp_path / "new" / "results"), "--json"]
    arguments += ["--model", str(tiny_model_folder), "--encoder", "cpu-used=8"]
    assert main(arguments) == 1
    bad_report, good_report = map(json.loads, capsys.readouterr().out.splitlines())
    assert "not a clip" in bad_report["error"] and bad_report["frames"] == 0
    assert good_report["error"] is None and good_report["frames"] == 3 and good_report["size"] == [64, 48]
    assert len(decoded(good_report["output"], "libvpx-vp9")) == 3
    assert good.read_bytes() == before

    assert main(arguments) == 1  # a second run keeps what exists
    assert json.loads(capsys.readouterr().out.splitlines()[1])["kept"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "h264"], "no transparency"),
        (["-o", "out.webm", "--format", "prores"], "needs the suffix .mov"),
        (["-o", "out.avi"], "needs the suffix"),
        (["--start", "3", "--end", "2"], "must be after"),
        (["--mask", "--background", "white"], "contradict"),
        (["--background", "no-such-colour"], "neither a colour"),
        (["-o", "clip.webm"], "overwrite"),
        (["-", "-o", "results/"], "standard input"),
    ],
)
def test_arguments_that_cannot_be_served(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.webm").touch()
    clips = [] if options[0] == "-" else ["clip.webm"]
    assert main(["video", *clips, *options]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["clip.webm"]
