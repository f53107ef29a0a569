"""birefnet.photos.finding: files, folders, glob patterns and URLs."""

from PIL import Image

from birefnet.photos.finding import find_photos


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)
    return path


def found(arguments, **options):
    photos, problems = find_photos([str(argument) for argument in arguments], **options)
    return [str(photo.relative) for photo in photos], problems


def test_folders_are_searched_recursively_for_photos_only(tmp_path):
    for name in ("b.JPG", "a.png", "deep/er/c.webp", ".hidden.png", ".thumbnails/d.png", "deep/._c.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no photo")
    assert found([tmp_path]) == (["a.png", "b.JPG", "deep/er/c.webp"], [])


def test_globs_keep_the_folders_after_the_first_wildcard(tmp_path):
    for name in ("shop/red/a.png", "shop/blue/a.png", "shop/blue/a.txt.png"):
        save(tmp_path / name)
    (tmp_path / "shop/blue/notes.txt").write_text("no photo")
    assert found([tmp_path / "shop/**/a.*"])[0] == ["blue/a.png", "blue/a.txt.png", "red/a.png"]


def test_an_existing_file_is_not_expanded_as_a_pattern(tmp_path):
    save(tmp_path / "a[1].png")
    assert found([tmp_path / "a[1].png"]) == (["a[1].png"], [])


def test_a_photo_named_twice_is_found_once(tmp_path):
    photo = save(tmp_path / "a.png")
    assert found([photo, tmp_path, tmp_path / "*.png"])[0] == ["a.png"]


def test_the_output_folder_is_not_searched(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "out/a.png")
    assert found([tmp_path], excluded_folder=tmp_path / "out")[0] == ["a.png"]


def test_arguments_without_a_photo_are_reported(tmp_path):
    photos, problems = found([tmp_path, tmp_path / "*.jpg"])
    assert photos == []
    assert [argument for argument, _ in problems] == [str(tmp_path), str(tmp_path / "*.jpg")]
    assert "no photo in this folder" in problems[0][1] and "matches this pattern" in problems[1][1]


def test_urls_are_downloads_named_after_their_path():
    arguments = [
        "https://example.org/a%20b/photo%201.jpg?size=2",
        "http://example.org",
        "https://example.org/a/%2e%2e",
    ]
    photos, problems = find_photos(arguments)
    assert [photo.url for photo in photos] == arguments and not problems
    assert [str(photo.relative) for photo in photos] == ["photo 1.jpg", "download", "download"]
    assert [photo.name for photo in photos] == arguments
