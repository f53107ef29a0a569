"""birefnet.cutout.stages: order, bounds and isolation of errors, with a fake pipeline."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from birefnet.concurrency import bounded_map
from birefnet.cutout.jobs import Job
from birefnet.cutout.stages import cut_out_photos
from birefnet.photos.finding import PhotoSource


class FakeRemover:
    """Has the stages of `BiRefNetPipeline`. Its network fails on batches with a photo of `refused_width`."""

    def __init__(self, refused_width=None, device="cpu"):
        self.device = torch.device(device)
        self.image_processor = SimpleNamespace(
            do_dynamic_resize=False, do_guided_upsampling=False, size={"height": 64, "width": 64}
        )
        self.refused_width = refused_width
        self.batches = []

    def preprocess(self, image):
        return {"photo": image}

    def forward(self, items):
        widths = [item["photo"].width for item in items]
        self.batches.append(widths)
        if self.refused_width in widths:
            raise RuntimeError("out of\nmemory")
        return items

    def postprocess(self, item, **options):
        return item["photo"].convert("L" if options.get("return_mask") else "RGBA")


def make_jobs(folder, count):
    """Photos of the widths 1, 2, 3, ..."""
    for width in range(1, count + 1):
        Image.new("RGB", (width, 5), "red").save(folder / f"{width}.png")
    names = [Path(f"{width}.png") for width in range(1, count + 1)]
    return [Job(PhotoSource(folder / name, name), folder / "out" / name) for name in names]


def test_photos_are_batched_reported_in_order_and_written(tmp_path):
    remover = FakeRemover()
    reports = list(cut_out_photos(make_jobs(tmp_path, 5), remover, batch_size=2, picture_format="png"))
    assert sorted(remover.batches) == [[1, 2], [3, 4], [5]]
    assert [report.size for report in reports] == [(width, 5) for width in range(1, 6)]
    for report in reports:
        assert report.error is None and report.seconds > 0
        assert Image.open(report.output).size == report.size


@pytest.mark.parametrize("device, count, networks", [("cpu", 1, 1), ("cpu", 5, 2), ("cuda", 5, 1)])
def test_each_stage_has_its_own_threads(tmp_path, monkeypatch, device, count, networks):
    def watched(stage, method):
        def call(*given, **options):
            now.append(stage)
            threads.setdefault(stage, set()).add((threading.get_ident(), torch.get_num_threads()))
            most["at once"] = max(most["at once"], now.count("forward"))
            time.sleep(0.1)
            now.remove(stage)
            return method(*given, **options)

        return call

    remover, now, threads, most = FakeRemover(device=device), [], {}, {"at once": 0}
    for stage in ("preprocess", "forward", "postprocess"):
        monkeypatch.setattr(remover, stage, watched(stage, getattr(remover, stage)))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        list(cut_out_photos(make_jobs(tmp_path, count), remover, batch_size=1, picture_format="png"))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert most["at once"] == networks
    assert {cores for _, cores in threads["forward"]} == {4 // networks}
    identities = [{identity for identity, _ in threads[stage]} for stage in threads]
    assert len(set.union(*identities)) == sum(map(len, identities)), "a thread of two stages"
    assert threading.get_ident() not in set.union(*identities)


def test_bad_photos_and_failing_batches_do_not_affect_other_photos(tmp_path):
    jobs = make_jobs(tmp_path, 6)
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "5.png").unlink()
    remover = FakeRemover(refused_width=3)
    reports = list(cut_out_photos(jobs, remover, batch_size=4, picture_format="png"))
    assert sorted(remover.batches) == [[2], [2, 3, 4], [3], [4], [6]]
    assert [report.error is None for report in reports] == [False, True, False, True, False, True]
    assert reports[2].error == "out of memory", "in one line"
    assert "No such file" in reports[4].error and "5.png" in reports[4].error
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["2.png", "4.png", "6.png"]


def test_a_result_that_appears_later_is_kept(tmp_path):
    jobs = make_jobs(tmp_path, 1)
    jobs[0].output.parent.mkdir()
    jobs[0].output.write_bytes(b"somebody else's")
    [report] = cut_out_photos(jobs, FakeRemover(), batch_size=1, picture_format="png")
    assert report.kept and jobs[0].output.read_bytes() == b"somebody else's"
    [report] = cut_out_photos(jobs, FakeRemover(), batch_size=1, picture_format="png", overwrite=True)
    assert not report.kept and Image.open(jobs[0].output).size == (1, 5)


def test_an_unwritable_folder_is_reported(tmp_path):
    jobs = make_jobs(tmp_path, 1)
    (tmp_path / "out").write_text("a file where the folder should be")
    [report] = cut_out_photos(jobs, FakeRemover(), batch_size=1, picture_format="png")
    assert "File exists" in report.error and str(tmp_path / "out") in report.error


def test_masks_take_large_jpegs_at_reduced_size_and_cut_outs_at_full(tmp_path):
    Image.new("RGB", (1600, 1200)).save(tmp_path / "a.jpg")
    for return_mask, expected in ((True, (200, 150)), (False, (1600, 1200))):
        job = Job(PhotoSource(tmp_path / "a.jpg", Path("a.jpg")), tmp_path / f"{return_mask}.png")
        [report] = cut_out_photos([job], FakeRemover(), batch_size=1, picture_format="png", return_mask=return_mask)
        assert report.size == (1600, 1200)
        assert Image.open(report.output).size == expected, "the fake matte has the size of the decoded photo"


def test_bounded_map_keeps_order_and_the_bound():
    started, taken = [], 0

    def work(number):
        started.append(number)
        time.sleep(0.001 * (5 - number % 5))
        return number

    with ThreadPoolExecutor(4) as executor:
        for number in bounded_map(executor, work, range(40), ahead=6):
            assert number == taken
            taken += 1
            assert len(started) <= taken + 6
    assert taken == 40


def test_bounded_map_yields_finished_results_at_once():
    with ThreadPoolExecutor(1) as executor:
        drawn = []

        def items():
            for number in range(10):
                drawn.append(number)
                yield number
                time.sleep(0.02)

        first = next(bounded_map(executor, str, items(), ahead=8))
        assert first == "0" and len(drawn) <= 3


def test_an_interruption_stops_the_threads(tmp_path):
    remover = FakeRemover()
    reports = cut_out_photos(make_jobs(tmp_path, 20), remover, batch_size=1, picture_format="png")
    next(reports)
    with pytest.raises(KeyboardInterrupt):
        reports.throw(KeyboardInterrupt)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("decode", "network", "finish"))]
    assert len(remover.batches) < 20
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="this system cannot send a signal to a thread")
def test_ctrl_c_ends_a_running_network_at_its_next_layer(tmp_path, monkeypatch):
    remover, layer, layers_run = FakeRemover(), torch.nn.Identity(), []

    def slow_network(items):
        for number in range(1000):
            layers_run.append(layer(number))
            if number == 10:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.01)
        return items

    monkeypatch.setattr(remover, "forward", slow_network)
    # A script in the background ignores the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(cut_out_photos(make_jobs(tmp_path, 1), remover, batch_size=1, picture_format="png"))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(layers_run) < 1000
    assert layer(2) == 2, "later calls are not stopped"
