"""`birefnet.data.pairs`: all kinds of sources, soft masks, and reports of bad pairs."""

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from birefnet.data.pairs import BadPairError, decode_pair, read_pairs
from birefnet.training.dataset import MattingDataset

from ..drawn_photos import draw_pair, write_folder


def encoded(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def write_parquet(path, rows, columns=("image", "mask"), as_structures=True):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = [[encoded(picture) for picture in draw_pair(seed)] for seed in range(rows)]
    table = {
        column: [{"bytes": row[i], "path": None} if as_structures else row[i] for row in cells]
        for i, column in enumerate(columns)
    }
    parquet.write_table(pyarrow.table(table), path)
    return path


def test_folder_is_matched_by_stem_and_the_unmatched_are_listed(tmp_path, caplog):
    write_folder(tmp_path, ["a", "b", "alone"])
    (tmp_path / "gt" / "alone.png").unlink()
    Image.new("L", (4, 4)).save(tmp_path / "gt" / "stray.webp", lossless=True)
    with caplog.at_level(logging.WARNING):
        pairs = read_pairs([tmp_path])
    assert [pair.name for pair in pairs] == [str(tmp_path / "im" / "a.jpg"), str(tmp_path / "im" / "b.jpg")]
    assert "2 files" in caplog.text and "alone.jpg" in caplog.text and "stray.webp" in caplog.text


def test_any_picture_type_and_subfolders_match(tmp_path):
    photo, mask = draw_pair()
    for place, picture, ending in (("im", photo, "webp"), ("gt", mask, "bmp")):
        (tmp_path / place / "sub").mkdir(parents=True)
        picture.save(tmp_path / place / "sub" / f"x.{ending}")
    assert len(read_pairs([tmp_path])) == 1


def test_two_files_of_one_name_are_refused(tmp_path):
    write_folder(tmp_path, ["a"])
    draw_pair()[0].save(tmp_path / "im" / "a.png")
    with pytest.raises(ValueError, match=r"a\.jpg, .*a\.png"):
        read_pairs([tmp_path])


@pytest.mark.parametrize("as_structures", [True, False])
def test_parquet_holds_bytes_or_structures(tmp_path, as_structures):
    pairs = read_pairs([write_parquet(tmp_path / "x.parquet", 3, as_structures=as_structures)])
    assert [pair.name for pair in pairs] == [f"{tmp_path / 'x.parquet'}, row {row}" for row in range(3)]
    photo, mask = decode_pair(pairs[2])
    np.testing.assert_array_equal(np.asarray(photo), np.asarray(draw_pair(2)[0]))
    np.testing.assert_array_equal(np.asarray(mask), np.asarray(draw_pair(2)[1]))


def test_sources_are_joined_in_order_and_globs_expanded(tmp_path):
    for name in ("train-1", "train-0"):
        write_parquet(tmp_path / f"{name}.parquet", 2)
    write_folder(tmp_path / "photos", ["a"])
    names = [pair.name for pair in read_pairs([tmp_path / "photos", f"{tmp_path}/train-*.parquet"])]
    expected = ["photos/im/a.jpg", *(f"train-{n}.parquet, row {row}" for n in (0, 1) for row in (0, 1))]
    assert names == [f"{tmp_path}/{name}" for name in expected]


def test_hub_data_set_comes_through_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    write_parquet(tmp_path / "x.parquet", 3, columns=("photo", "matte"))
    dataset = datasets.Dataset.from_parquet(str(tmp_path / "x.parquet"), cache_dir=str(tmp_path / "cache"))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or dataset)
    pairs = read_pairs(["owner/name:test"], "photo", "matte")
    assert asked == [("owner/name", "test")]
    assert pairs[1].name == "owner/name:test, row 1"
    np.testing.assert_array_equal(np.asarray(decode_pair(pairs[1])[1]), np.asarray(draw_pair(1)[1]))


def test_wrong_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_pairs([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="im"):
        read_pairs([tmp_path])
    for place in ("im", "gt"):
        (tmp_path / place).mkdir()
    with pytest.raises(ValueError, match="no photo with a mask"):
        read_pairs([tmp_path])
    with pytest.raises(ValueError, match=r"'matte'.*image, mask"):
        read_pairs([write_parquet(tmp_path / "x.parquet", 1)], "image", "matte")


def test_soft_masks_stay_soft_in_every_mode(tmp_path):
    photo, mask = draw_pair()
    write_folder(tmp_path, ["a"])
    expected = np.asarray(mask)
    assert len(np.unique(expected)) > 10
    wide = Image.fromarray(expected.astype(np.uint16) * 257)
    cut_out = Image.merge("RGBA", (*photo.split(), mask))
    for saved in (mask, wide, mask.convert("RGB"), mask.convert("RGBA"), mask.convert("LA"), cut_out):
        saved.save(tmp_path / "gt" / "a.png")
        found = np.asarray(decode_pair(read_pairs([tmp_path])[0])[1])
        np.testing.assert_array_equal(found, expected, err_msg=saved.mode)


def test_orientation_is_applied(tmp_path):
    photo = draw_pair()[0]
    write_folder(tmp_path, ["a"])
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was rotated, so the stored picture lies on its side.
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "im" / "a.jpg", exif=exif)
    assert decode_pair(read_pairs([tmp_path])[0])[0].size == photo.size


def spoil_photo(folder):
    content = (folder / "im" / "b.jpg").read_bytes()
    (folder / "im" / "b.jpg").write_bytes(content[: len(content) // 2])


def spoil_text(folder):
    (folder / "im" / "b.jpg").write_text("no picture")


def spoil_empty(folder):
    (folder / "gt" / "b.png").write_bytes(b"")


def spoil_size(folder):
    Image.new("L", (20, 20), 255).save(folder / "gt" / "b.png")


def spoil_black(folder):
    Image.new("L", (48, 32), 0).save(folder / "gt" / "b.png")


def spoil_scale(folder):
    Image.new("L", (48, 32), 1).save(folder / "gt" / "b.png")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_photo, "photo cannot be read"),
        (spoil_text, "photo cannot be read"),
        (spoil_empty, "mask cannot be read"),
        (spoil_size, "the mask is 20×20 pixels, the photo 48×32"),
        (spoil_black, "all black"),
        (spoil_scale, "largest value is 1 of 255"),
    ],
)
def test_bad_pair_is_named_and_left_out_or_stops(tmp_path, caplog, spoil, reason):
    spoil(write_folder(tmp_path, ["a", "b", "c"]))
    pairs = read_pairs([tmp_path])
    with caplog.at_level(logging.WARNING):
        dataset = MattingDataset(pairs, (16, 16), show_progress=False)
    assert [pair.name[-5] for pair in dataset.pairs] == ["a", "c"]
    assert str(tmp_path / "im" / "b.jpg") in caplog.text and reason in caplog.text
    assert dataset.__getitems__([1])["names"] == [str(tmp_path / "im" / "c.jpg")]
    with pytest.raises(BadPairError, match=rf"b\.jpg.*{reason}"):
        MattingDataset(pairs, (16, 16), on_bad_data="stop", show_progress=False)


def test_nothing_good_is_an_error(tmp_path):
    spoil_text(write_folder(tmp_path, ["b"]))
    with pytest.raises(ValueError, match="None of the 1 pairs"):
        MattingDataset(read_pairs([tmp_path]), (16, 16), show_progress=False)


def test_batches_are_the_resized_pictures_cached_or_not(tmp_path):
    pairs = read_pairs([write_folder(tmp_path, ["a", "b", "c"])])
    cached, read_anew = (MattingDataset(pairs, (24, 40), cache=cache, show_progress=False) for cache in (True, False))
    assert cached.pixels.shape == (3, 4, 24, 40) and read_anew.pixels is None
    batch, other = cached.__getitems__([2, 0]), read_anew.__getitems__([2, 0])
    photo, mask = (picture.resize((40, 24), Image.Resampling.BILINEAR) for picture in decode_pair(pairs[2]))
    np.testing.assert_array_equal(batch["pixel_values"][0].permute(1, 2, 0), np.asarray(photo))
    np.testing.assert_array_equal(batch["labels"][0, 0], np.asarray(mask))
    for key in ("pixel_values", "labels"):
        assert batch[key].dtype == torch.uint8
        assert torch.equal(batch[key], other[key])
    assert batch["names"] == other["names"] == [pairs[2].name, pairs[0].name]


def test_cache_is_chosen_by_the_free_memory(tmp_path, monkeypatch):
    pairs = read_pairs([write_folder(tmp_path, ["a"])])
    monkeypatch.setattr("birefnet.training.dataset.free_memory", lambda: 2 * 4 * 16 * 16)
    assert MattingDataset(pairs, (16, 16), show_progress=False).pixels is None
    monkeypatch.setattr("birefnet.training.dataset.free_memory", lambda: 2 * 4 * 16 * 16 + 2)
    assert MattingDataset(pairs, (16, 16), show_progress=False).pixels is not None


def test_mask_is_read_at_its_own_size(tmp_path):
    dataset = MattingDataset(read_pairs([write_folder(tmp_path, ["a"])]), (16, 16), show_progress=False)
    mask = dataset.read_mask(0)
    assert mask.shape == (1, 32, 48)
    np.testing.assert_allclose(mask[0].numpy(), np.asarray(draw_pair(0)[1]) / 255, atol=1e-7)


def test_progress_bar_is_for_terminals(tmp_path, capsys):
    MattingDataset(read_pairs([write_folder(tmp_path, ["a"])]), (32, 32), show_progress=True)
    assert capsys.readouterr().err == ""
