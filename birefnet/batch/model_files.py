"""The model as files: hashed once by the driver, and sent to each node once, however many workers the node has."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from birefnet import repository_folder
from birefnet.errors import CommandError


CHUNK = 64 * 2**20  # bytes per object in Ray's store


def model_folder(model: str | None, variant: str | None) -> Path:
    """
    A folder with `config.json`, `preprocessor_config.json` and weights for what the user named.

    A local folder in this project's form is taken as it is. Anything else is fetched and converted once, into the
    cache folder.

    Raises:
        CommandError: the model cannot be found or read.
    """
    from birefnet.inference.loading import is_own, load_model

    source = variant or model
    if source is None:
        return repository_folder()
    if variant is None and Path(source).is_dir() and is_own(source):
        return Path(source)
    try:
        network, processor = load_model(source)
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(f"the model {source} cannot be loaded: {error}") from error
    folder = Path(tempfile.mkdtemp(prefix="converted-", dir=cache_folder()))
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    kept = cache_folder() / hash_of(folder)
    _publish(folder, kept)
    return kept


def model_files(folder: Path) -> list[Path]:
    """The files that results depend on."""
    wanted = [folder / "config.json", folder / "preprocessor_config.json", *sorted(folder.glob("model*.safetensors*"))]
    return [path for path in wanted if path.is_file()]


def hash_of(folder: Path) -> str:
    """sha256 of the model's files and their names."""
    total = hashlib.sha256()
    for path in model_files(folder):
        with open(path, "rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def put_in_object_store(folder: Path) -> list:
    """The model's files as (name, list of references) in Ray's object store, which holds one copy per node."""
    import ray

    return [(path.name, [ray.put(chunk) for chunk in _chunks(path)]) for path in model_files(folder)]


def folder_on_this_node(digest: str, stored: list) -> Path:
    """
    The model's files as a folder on this node's disk. The first worker of a node writes it; the others find it.

    Args:
        digest: `hash_of` the model.
        stored: what `put_in_object_store` returned.
    """
    import ray

    folder = cache_folder() / digest
    with open(cache_folder() / f"{digest}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            partial = Path(tempfile.mkdtemp(prefix="received-", dir=cache_folder()))
            for name, references in stored:
                with open(partial / name, "wb") as file:
                    for reference in references:
                        file.write(ray.get(reference))
            _publish(partial, folder)
    return folder


def cache_folder() -> Path:
    """`BIREFNET_CACHE`, or `birefnet` in the user's cache folder; made if missing."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("BIREFNET_CACHE") or Path(base, "birefnet")) / "batch-models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _publish(partial: Path, folder: Path) -> None:
    """Gives a complete folder its name. Another process may have been faster: its folder is the same."""
    try:
        os.rename(partial, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(partial)


def _chunks(path: Path):
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
