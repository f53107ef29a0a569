import io
import sys

import numpy as np
import pytest

from birefnet.errors import CommandError


av = pytest.importorskip("av", reason="the extra `video` is not installed")
pytest.importorskip("cv2", reason="the extra `video` is not installed")

from birefnet.video.clips import clip_from  # noqa: E402

from ..drawn_clips import picture, write_clip  # noqa: E402


def frames_of(source, **options):
    with clip_from(str(source), **options) as clip:
        return clip, list(clip.frames())


def close(photo, expected: np.ndarray, tolerance: float = 12) -> bool:
    return np.abs(np.asarray(photo).astype(int) - expected).mean() < tolerance


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotation_in_the_metadata_is_applied(tmp_path, rotation):
    clip, frames = frames_of(write_clip(tmp_path / "clip.mp4", 2, rotation=rotation))
    expected = np.rot90(picture(0), rotation // 90)  # FFmpeg's angles are counterclockwise
    assert clip.size == expected.shape[1::-1] and close(frames[0].photo, expected)


@pytest.mark.parametrize(
    ("codec", "pixel_format", "size"),
    [("libx264", "yuv420p10le", (64, 48)), ("libx264", "yuv444p", (63, 47)), ("ffv1", "gray", (35, 21))],
)
def test_other_depths_and_odd_sizes(tmp_path, codec, pixel_format, size):
    clip, frames = frames_of(write_clip(tmp_path / "clip.mkv", 3, size, codec, pixel_format))
    expected = picture(2, *size)
    if pixel_format == "gray":
        expected = expected @ np.array([0.299, 0.587, 0.114])
        expected = expected[..., None]
    assert clip.size == size and close(frames[2].photo, expected)


def test_times_of_a_variable_frame_rate(tmp_path):
    times = [0, 40, 55, 200, 207]
    clip, frames = frames_of(write_clip(tmp_path / "clip.mkv", 5, times=times))
    assert [round(float(frame.time * clip.time_base) * 1000) for frame in frames] == times


def test_interlaced_clips_are_deinterlaced(tmp_path):
    def interlaced(stream):
        stream.codec_context.flags |= 1 << 18 | 1 << 29  # interlaced DCT and motion estimation
        stream.codec_context.options = {"x264-params": "tff=1"}

    path = write_clip(tmp_path / "clip.mp4", 6, set_up=interlaced)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).interlaced_frame
    _, frames = frames_of(path)
    assert len(frames) == 6 and close(frames[3].photo, picture(3))


def test_part_and_step(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", 10)
    with clip_from(str(path)) as clip:
        frames = list(clip.frames(start=0.08, end=0.32, every=2))
        assert [float(frame.time * clip.time_base) for frame in frames] == [0.08, 0.16, 0.24]
        assert [frame.index for frame in clip.frames(every=3, first=2)] == [2, 3]


def test_picture_sequences_raw_video_and_standard_input(tmp_path, monkeypatch):
    from PIL import Image

    for number in range(3):
        Image.fromarray(picture(number)).save(tmp_path / f"{number:03}.png")
    for source in (tmp_path, tmp_path / "%03d.png", tmp_path / "*.png"):
        clip, frames = frames_of(source, rate=10)
        assert clip.rate == 10 and len(frames) == 3
        assert np.array_equal(np.asarray(frames[2].photo), picture(2))

    raw = b"".join(picture(number).tobytes() for number in range(3))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    options = {"video_size": "64x48", "pixel_format": "rgb24", "framerate": "5"}
    _, frames = frames_of("-", raw=options)
    assert len(frames) == 3 and np.array_equal(np.asarray(frames[1].photo), picture(1))

    container = write_clip(tmp_path / "clip.mp4", 3).read_bytes()  # its index is at the end: it cannot be streamed
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(container)))
    assert len(frames_of("-")[1]) == 3


def test_what_is_no_clip_is_named(tmp_path):
    (tmp_path / "text.mp4").write_text("no clip")
    with av.open(str(tmp_path / "sound.m4a"), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux([*sound.encode(frame), *sound.encode()])
    whole = write_clip(tmp_path / "whole.mp4", 8).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    for name, message in {
        "text.mp4": "not a clip",
        "sound.m4a": "audio only",
        "cut.mp4": "not a clip",
        "missing.mp4": "no such file",
        "empty": "no picture",
    }.items():
        with pytest.raises(CommandError, match=message):
            frames_of(tmp_path / name)


def test_a_file_that_ends_early_gives_what_it_holds(tmp_path):
    whole = write_clip(tmp_path / "whole.mkv", 30, options={"g": "5", "bf": "0"}).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: int(len(whole) * 0.6)])
    clip, frames = frames_of(tmp_path / "cut.mkv")
    assert 5 < len(frames) < 30 and close(frames[4].photo, picture(4))
    assert "of the 1.2 seconds" in clip.notes[0]
    assert not frames_of(tmp_path / "whole.mkv")[0].notes


def test_frames_of_another_size_are_scaled_with_a_note(tmp_path):
    parts = [write_clip(tmp_path / f"{size[0]}.h264", 3, size) for size in ((64, 48), (96, 72))]
    (tmp_path / "both.h264").write_bytes(b"".join(part.read_bytes() for part in parts))
    clip, frames = frames_of(tmp_path / "both.h264")
    assert {frame.photo.size for frame in frames} == {(64, 48)} and len(frames) == 6
    assert "another size" in clip.notes[0]
