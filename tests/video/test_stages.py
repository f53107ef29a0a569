import errno
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from birefnet.errors import CommandError


av = pytest.importorskip("av", reason="the extra `video` is not installed")
pytest.importorskip("cv2", reason="the extra `video` is not installed")

from birefnet.video import cut_out_video, stages, video_mattes  # noqa: E402
from birefnet.video.clips import clip_from  # noqa: E402
from birefnet.video.stages import Options  # noqa: E402
from birefnet.video.writing import fill_transparent  # noqa: E402

from ..drawn_clips import decoded, picture, times_of, write_clip  # noqa: E402


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def remover(tiny_model_folder):
    from birefnet.inference import load_remover

    return load_remover(str(tiny_model_folder), device="cpu")


@pytest.fixture
def run(remover, tmp_path):
    """Cuts out a clip with segments of four frames, and gives the output."""

    def run_once(source, output="out.mov", resume=False, progress=None, **options):
        with clip_from(str(source)) as clip:
            stages.write_clip(clip, tmp_path / output, remover, Options(**options), resume, progress, segment=4)
        return tmp_path / output

    return run_once


def packets(path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(container.streams.video[0]) if packet.size]


def sound(path) -> list[tuple]:
    with av.open(str(path)) as container:
        track = container.streams.audio[0]
        packets = [packet for packet in container.demux(track) if packet.size]
        return [(round(float(packet.pts * packet.time_base), 4), bytes(packet)) for packet in packets]


def test_prores_keeps_alpha_times_and_sound(tmp_path, run, remover):
    times = [0, 40, 55, 200, 207, 300]
    source = write_clip(tmp_path / "clip.mov", 6, times=times, audio="aac")
    output = run(source, format="prores")
    assert times_of(output) == times_of(source) == [time / 1000 for time in times]
    assert sound(output) == sound(source)
    with clip_from(str(source)) as clip:
        expected = remover.postprocess(remover.forward([remover.preprocess(next(clip.frames()).photo)])[0])
    first = decoded(run(source, "alone.mov", format="prores", stabilize=False))[0]
    assert np.abs(first[..., 3].astype(int) - np.asarray(expected)[..., 3]).max() <= 3
    assert not list(tmp_path.glob(".*partial*"))


def test_webm_has_alpha_and_times_to_the_millisecond(tmp_path, run):
    source = write_clip(tmp_path / "clip.mp4", 6, audio="aac")
    output = run(source, "out.webm", format="webm")
    alpha = decoded(output, "libvpx-vp9")[0][..., 3]
    assert alpha.min() < 60 and alpha.max() > 200
    assert times_of(output) == pytest.approx(times_of(source), abs=1e-3)
    with av.open(str(output)) as container:
        assert container.streams.video[0].metadata["ALPHA_MODE"] == "1"
        assert container.streams.audio[0].codec_context.name in ("opus", "libopus")  # WebM holds no AAC


def test_colour_marks_are_kept(tmp_path, run):
    def marked(stream):
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, 14, 9, 2

    source = write_clip(tmp_path / "clip.mp4", 2, set_up=marked)
    output = run(source, "out.mp4", format="h264", background=(0, 255, 0))
    with av.open(str(output)) as container:
        context = container.streams.video[0].codec_context
        frame = next(container.decode(video=0))
        assert (int(context.color_primaries), int(context.color_trc)) == (9, 14)
        assert (int(frame.colorspace), int(frame.color_range)) == (9, 2)


def test_backgrounds_masks_and_sequences(tmp_path, run):
    source = write_clip(tmp_path / "clip.mp4", 5, (63, 47), pixel_format="yuv444p")
    behind = write_clip(tmp_path / "behind.mp4", 2)
    for background in ((0, 0, 255), "blur", Image.new("RGB", (8, 8), "red"), behind):
        output = run(source, "out.mp4", format="h264", background=background, stabilize=False)
        assert len(decoded(output)) == 5 and decoded(output)[0].shape[:2] == (48, 64)  # 4:2:0 needs even sides
    mattes = run(source, "mattes", format="png", return_mask=True)
    pictures = run(source, "pictures", format="png")
    assert len(list(mattes.iterdir())) == len(list(pictures.iterdir())) == 5
    alpha = np.asarray(Image.open(pictures / "000003.png"))[..., 3]
    assert np.array_equal(alpha, np.asarray(Image.open(mattes / "000003.png")))
    linear = run(source, "linear", format="exr")
    with av.open(str(linear / "000003.exr")) as container:
        frame = next(container.decode(video=0))
        planes = [np.frombuffer(plane, np.float32).reshape(47, -1)[:, :63] for plane in frame.planes]  # G, B, R, A
    assert np.abs(planes[3] - alpha / 255).max() < 1e-6 and (planes[0] <= planes[3] + 1e-6).all()


def test_nothing_of_what_was_cut_away_is_in_the_file():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (90, 130, 4), np.uint8)
    pixels[..., 3] = 0
    pixels[30:60, 40:80] = (200, 100, 50, 255)
    pixels[30, 40:80, 3] = 90
    filled = fill_transparent(pixels)
    shown = pixels[..., 3] > 0
    assert np.array_equal(filled[shown], pixels[shown]) and np.array_equal(filled[..., 3], pixels[..., 3])
    assert np.abs(filled[~shown][:, :3].astype(int) - (200, 100, 50)).max() <= 1  # the subject's colour
    assert not fill_transparent(np.zeros((1, 1, 4), np.uint8)).any()


def test_a_run_that_was_stopped_goes_on_exactly(tmp_path, run):
    source = write_clip(tmp_path / "clip.mp4", 10, audio="aac")
    whole = packets(run(source, "whole.mov", format="prores"))

    def stop(done):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(source, "stopped.mov", format="prores", progress=stop)
    assert packets(tmp_path / "stopped.mov") == whole[:4] + packets(tmp_path / "stopped.mov")[4:]
    assert len(decoded(tmp_path / "stopped.mov")) == 6  # what was done is playable
    seen = []
    resumed = run(source, "stopped.mov", resume=True, format="prores", progress=seen.append)
    assert seen[0] == 5 and packets(resumed) == whole  # the four frames of the whole segment were not done again
    assert sound(resumed) == sound(source)

    with pytest.raises(KeyboardInterrupt):
        run(source, "stopped.mov", format="prores", progress=stop)
    with pytest.raises(CommandError, match="arguments"):
        run(source, "stopped.mov", resume=True, format="prores", every=2)


def test_a_full_disk_keeps_what_was_finished(tmp_path, run, monkeypatch):
    source = write_clip(tmp_path / "clip.mp4", 10)
    write, count = stages.SegmentWriter.write, []

    def full(self, picture, time):
        count.append(time)
        if len(count) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, picture, time)

    monkeypatch.setattr(stages.SegmentWriter, "write", full)
    with pytest.raises(CommandError, match="No space left"):
        run(source, format="prores")
    assert len(decoded(tmp_path / "out.mov")) == 6
    monkeypatch.undo()
    assert len(decoded(run(source, resume=True, format="prores"))) == 10


def test_repeated_frames_need_no_network(tmp_path, remover, monkeypatch):
    repeated = np.repeat(np.stack([picture(number) for number in range(3)]), 3, 0)
    for number, pixels in enumerate(repeated):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    seen = []
    forward = remover.forward
    monkeypatch.setattr(remover, "forward", lambda items: seen.extend(items) or forward(items))
    with clip_from(str(tmp_path)) as clip:
        items = list(stages.process(clip.frames(), remover, lambda frame, outputs: outputs["logits"], batch_size=2))
    assert len(seen) == 3
    logits = [item.picture for item in items]
    assert torch.equal(logits[0], logits[2]) and not torch.equal(logits[2], logits[3])


def test_mattes_come_one_by_one(tmp_path, remover):
    source = write_clip(tmp_path / "clip.mp4", 60)
    mattes = video_mattes(source, remover.model, remover.image_processor, batch_size=2)
    photo, matte, time = next(mattes)
    assert photo.size == (64, 48) and matte.shape == (48, 64) and matte.dtype == np.uint8 and time == 0
    assert next(mattes)[2] == pytest.approx(0.04)
    mattes.close()
    assert cut_out_video(source, tmp_path / "all.webm", remover.model, remover.image_processor) == 60


def test_decoding_stays_a_few_frames_ahead(remover):
    taken = []

    def endless():
        for index in range(10_000):
            taken.append(index)
            yield stages.Frame(index, index, Image.fromarray(picture(index % 7)))

    results = stages.process(endless(), remover, lambda frame, outputs: None)
    for _ in range(5):
        next(results)
    results.close()
    assert len(taken) < 40


def test_errors_of_the_decoder_reach_the_caller(remover):
    def broken():
        yield stages.Frame(0, 0, Image.fromarray(picture(0)))
        raise CommandError("no more")

    with pytest.raises(CommandError, match="no more"):
        list(stages.process(broken(), remover, lambda frame, outputs: None))


@pytest.mark.parametrize(
    ("option", "message"),
    [(("nonsense", "1"), "has no option nonsense"), (("cpu-used", "abc"), "cannot encode 64×48 with .*cpu-used=abc")],
)
def test_an_option_that_the_encoder_refuses(tmp_path, run, option, message):
    source = write_clip(tmp_path / "clip.mp4", 2)
    with pytest.raises(CommandError, match=message):
        run(source, "out.webm", format="webm", encoder=(option,))
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_suffix_of_another_format_is_refused(tmp_path, run):
    with pytest.raises(CommandError, match="needs the suffix .mov"):
        run(write_clip(tmp_path / "clip.mp4", 1), "out.webm", format="prores")


def test_no_frame_in_the_span(tmp_path, run):
    with pytest.raises(CommandError, match="no frame"):
        run(write_clip(tmp_path / "clip.mp4", 3), format="prores", start=5.0)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_folder_in_the_place_of_the_output(tmp_path, run):
    (tmp_path / "out.mov").mkdir()
    with pytest.raises(CommandError, match="is a folder"):
        run(write_clip(tmp_path / "clip.mp4", 1), format="prores")


def test_times_of_a_part_count_from_its_start(tmp_path, run):
    source = write_clip(tmp_path / "clip.mov", 20, audio="aac")
    output = run(source, format="prores", start=0.2, end=0.4)
    assert times_of(output) == pytest.approx([0, 0.04, 0.08, 0.12, 0.16])
    assert 0 <= sound(output)[0][0] < 0.03 and sound(output)[-1][0] < 0.2


def test_one_frame(tmp_path, run):
    assert len(decoded(run(write_clip(tmp_path / "clip.mp4", 1), format="prores"))) == 1


def test_help_needs_no_torch():
    code = "import sys, birefnet.command_line as c; c.build_parser('video'); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
