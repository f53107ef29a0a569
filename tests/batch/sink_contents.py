"""What the tests look at in a sink, and how they change a photo."""

import json

from ..drawn_photos import draw_pair


def pictures(folder):
    """Relative path -> bytes of all results."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "_birefnet" not in path.parts
    }


def records(sink):
    """All lines of all manifests."""
    return [
        json.loads(line)
        for path in (sink / "_birefnet/blocks").iterdir()
        for line in path.read_text().splitlines()[1:]
    ]


def change(photo):
    """Another picture in the same file, with another size."""
    draw_pair(99, (64, 40))[0].save(photo)
