"""The folder that `birefnet export` writes: programs, and the settings that transformers.js and Python read."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from birefnet import repository_folder
from birefnet.errors import CommandError, UsageError


EMBEDDED = "embedded"  # stands for the weights that come with the package
FULL_DISK = 1_000_000  # bytes; a write that failed with less than this free failed for want of space


@dataclass
class ExportedFile:
    """A file that was written, and how well it agrees with PyTorch."""

    path: str
    dtype: str
    megabytes: float
    agreement: dict
    summary: str


def export_model(
    source,
    out,
    file_format: str = "onnx",
    size: tuple[int, int] | str | None = None,
    dynamic_batch: bool = False,
    dtypes: tuple[str, ...] = ("float32",),
    photo=None,
    overwrite: bool = False,
) -> list[ExportedFile]:
    """
    Exports a network, runs each file in its runtime, and keeps it only if it agrees with PyTorch.

    Args:
        source (`str` or `Path`): a folder, a file of weights, a variant's name, a Hub repository, or `"embedded"`.
        out (`str` or `Path`): the folder to write to. Files of other formats and dtypes in it are kept.
        file_format (`str`): `"onnx"`, `"openvino"` or `"torch"`.
        size (*optional*): (height, width) in pixels, multiples of 32, or `"dynamic"` for any such size; by default
            the size that the model was trained at.
        dynamic_batch (`bool`): whether the file takes any number of photos at a time instead of one.
        dtypes (`tuple[str]`): of `"float32"`, `"float16"` and `"int8"`; one file each.
        photo (`PIL.Image.Image`, *optional*): what results are compared on; by default a drawn picture.
        overwrite (`bool`): whether existing files are replaced.

    Returns:
        `list[ExportedFile]`

    Raises:
        CommandError: a package is missing, a file exists, the disk is full, or a file disagrees with PyTorch.
        UsageError: a size, format or dtype is not allowed.
    """
    targets = file_paths(file_format, Path(out), dtypes)
    check_size(size)
    if not overwrite:
        for path in targets.values():
            if path.exists():
                raise CommandError(f"{path} exists and was kept; --overwrite replaces it.")
    model, processor = load_network(source)
    return write_programs(model, processor, out, targets, file_format, size, dynamic_batch, photo)


def write_programs(model, processor, out, targets, file_format, size, dynamic_batch, photo=None):
    """As [`export_model`], for a loaded network; `targets` are the files by dtype."""
    from birefnet.export.programs import PROGRAMS
    from birefnet.export.verification import compare, expected_logits, input_shapes
    from birefnet.inference.runtimes import RUNTIMES
    from birefnet.photos.drawing import draw_picture

    is_dynamic = size == "dynamic"
    if is_dynamic and model.config.backbone.startswith("swin_v1"):
        raise UsageError(
            f"--size dynamic: a Swin network ({model.config.backbone}) has one file per size. How many windows "
            "it has depends on the size, and the exporter takes such numbers for constants."
        )
    own_size = (processor.size["height"], processor.size["width"])
    size = own_size if size is None or is_dynamic else size
    _check_other_files(Path(out), size, targets)
    pairs = expected_logits(model, processor, photo or draw_picture(), input_shapes(size, is_dynamic, dynamic_batch))
    folder = next(iter(targets.values())).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, model, len(targets))
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as scratch, _full_disk_is_named(folder):
            example = pairs[-1][0].clone()
            program = PROGRAMS[file_format](model, example, is_dynamic, dynamic_batch, Path(scratch))
            reports = []
            for dtype, target in targets.items():
                written = program.write(dtype, target.name)
                network = RUNTIMES[file_format](written, model.config)
                agreement = compare(network, pairs, dtype, target.name)
                del network  # it may hold the file open
                reports.append(_report(target, written, dtype, agreement))
                for file in reversed(_with_weights(written)):  # a program never waits for its weights
                    whole = Path(scratch, "whole")
                    shutil.copyfile(file, whole)  # other dtypes are still made from the file itself
                    os.replace(whole, target.with_name(file.name))
                write_settings(Path(out), model.config, processor, size)
    except OSError as error:
        raise CommandError(f"{out}: {error}") from error
    return reports


def file_paths(file_format: str, out: Path, dtypes) -> dict[str, Path]:
    """The path of each dtype's file."""
    from birefnet.inference.runtimes import FILES

    if file_format not in FILES:
        raise UsageError(f"--format {file_format} is not one of {', '.join(FILES)}.")
    names = FILES[file_format]
    for dtype in dtypes:
        if dtype not in names:
            raise UsageError(f"--dtype {dtype}: {file_format} files are written in {', '.join(names)}.")
    return {dtype: out / file_format / names[dtype] for dtype in dtypes}


def check_size(size) -> None:
    """Raises `UsageError` if sides are no positive multiples of 32."""
    if size is None or size == "dynamic":
        return
    if len(size) != 2 or any(side < 32 or side % 32 for side in size):
        raise UsageError(f"--size {'x'.join(map(str, size))}: both sides must be positive multiples of 32.")


def load_network(source):
    """The network and processor that a source names; see [`export_model`]."""
    from transformers.utils.logging import disable_progress_bar

    from birefnet.inference import load_model

    disable_progress_bar()
    source = repository_folder() if str(source) == EMBEDDED else source
    try:
        return load_model(str(source))
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(f"the model {source} cannot be loaded: {error}") from error


def _check_space(folder: Path, model, count: int) -> None:
    """Raises `CommandError` if the disk cannot hold the files and the intermediate ones."""
    weights = sum(tensor.numel() * 4 for tensor in model.parameters())
    needed, free = (count + 2) * weights, shutil.disk_usage(folder).free
    if free < needed:
        raise CommandError(f"{folder} has {free / 1e9:.1f} GB free; exporting needs about {needed / 1e9:.1f} GB.")


@contextlib.contextmanager
def _full_disk_is_named(folder: Path):
    """Raises `CommandError` for an error that a full disk causes. Each runtime's library has its own type of error."""
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        is_full = getattr(error, "errno", None) == errno.ENOSPC or shutil.disk_usage(folder).free < FULL_DISK
        if is_full:  # seen before the temporary folder goes, which makes space again
            raise CommandError(f"{folder}: the disk is full. Only files that were complete are kept.") from error
        raise


def _check_other_files(out: Path, size: tuple[int, int], targets) -> None:
    """Raises `CommandError` if files that stay in the folder have another size: one processor serves them all."""
    from birefnet.inference.runtimes import FILES

    paths = [out / name / file for name, files in FILES.items() for file in files.values()]
    others = [path for path in paths if path.is_file() and path not in targets.values()]
    settings = out / "preprocessor_config.json"
    if not others or not settings.is_file():
        return
    found = json.loads(settings.read_text(encoding="utf-8"))["size"]
    if found != {"height": size[0], "width": size[1]}:
        raise CommandError(
            f"{others[0]} stays in {out}, which is for {found['height']}x{found['width']} and not for "
            f"{size[0]}x{size[1]}. Give another folder for another size."
        )


def _with_weights(path: Path) -> list[Path]:
    """A program's file and the one of its weights, if it has one."""
    candidates = [path, path.with_suffix(".bin"), path.with_name(f"{path.name}_data")]
    return [file for file in dict.fromkeys(candidates) if file.is_file()]


def _report(target: Path, written: Path, dtype: str, agreement) -> ExportedFile:
    megabytes = sum(file.stat().st_size for file in _with_weights(written)) / 1e6
    return ExportedFile(str(target), dtype, round(megabytes, 1), asdict(agreement), agreement.describe(dtype))


def write_settings(folder: Path, config, processor, size: tuple[int, int]) -> None:
    """
    Writes `config.json` and `preprocessor_config.json` as transformers.js and `AutoImageProcessor` read them.

    A folder that holds a complete repository keeps its `config.json`, and its processor's code stays in use.
    """
    settings = json.loads(processor.to_json_string())
    if not (folder / "image_processing_birefnet.py").is_file():
        fields = config.to_dict()
        for name in ("auto_map", "custom_pipelines"):  # lead to code that this folder does not have
            fields.pop(name, None)
        _write_json(folder / "config.json", fields)
        settings["do_dynamic_resize"] = False  # its network has one size
    settings["size"] = {"height": size[0], "width": size[1]}
    _write_json(folder / "preprocessor_config.json", processor_settings(settings))


def processor_settings(settings: dict) -> dict:
    """
    A processor's settings with a type that transformers.js knows. Python finds its own class by `auto_map`, or by the
    configuration's type where the class is registered.
    """
    settings = {name: value for name, value in settings.items() if name != "image_processor_type"}
    auto_map = {"AutoImageProcessor": "image_processing_birefnet.BiRefNetImageProcessor"}
    return {**settings, "auto_map": auto_map, "feature_extractor_type": "ViTFeatureExtractor"}


def _write_json(path: Path, settings: dict) -> None:
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)
