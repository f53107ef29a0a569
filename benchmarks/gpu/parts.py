"""The parts of `measure.py`. Each part measures, and records one row (a dictionary) after the other.

With `--tiny` the networks, sizes and numbers of photos are minute, and on a CPU nothing is worth reading but the fact
that it runs.
"""

import argparse
import copy
import gc
import gzip
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import end_to_end
import numpy as np
import picture
import reference_weights
import speed
import torch
import training_memory
from project import ROOT
from safetensors.torch import load_file

from birefnet.repository import hardware_birefnet
from birefnet.repository.checkpoint_birefnet import clean_state_dict
from birefnet.repository.configuration_birefnet import SWIN_BACKBONES, BiRefNetConfig
from birefnet.repository.deformable_birefnet import deformable_convolution
from birefnet.repository.matting_birefnet import cut_out, estimate_foreground
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation


TINY_SWIN = (16, (1, 1, 1, 1), (1, 1, 1, 1), 4)  # takes the place of Swin-T's and Swin-L's description
REFERENCE_FOLDER = ROOT / "tests" / "fixtures"
REPEATS = 15
HALF_DTYPES = ("float16", "bfloat16")


def prepare(arguments: argparse.Namespace, record: Callable) -> torch.device:
    """The first step of every part: checks the device and records the environment."""
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: PyTorch finds no GPU")
    record(environment=speed.environment(device, torch.get_num_threads()))
    allow_tf32(False)
    return device


def make_networks_tiny():
    SWIN_BACKBONES.update(dict.fromkeys(("swin_v1_t", "swin_v1_l"), TINY_SWIN))


def milliseconds(function: Callable, device: torch.device, repeats: int = REPEATS) -> float:
    """Median time of a call, after two calls to warm up."""
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device):
    """Give the memory of finished cases back, so that the next case's peak is its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allow_tf32(allowed: bool):
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


# ------------------------------------------------------------------------------------------------------------------
# Parity with the published code's outputs
# ------------------------------------------------------------------------------------------------------------------


def parity(arguments, record):
    """Logits of every reference configuration, and foreground colours, against the published code's on a CPU."""
    device = prepare(arguments, record)
    manifests = json.loads(gzip.decompress((REFERENCE_FOLDER / "reference.json.gz").read_bytes()))
    references = load_file(REFERENCE_FOLDER / "reference.safetensors")
    compare_foreground(record, device)
    if arguments.tiny:
        manifests = {name: manifests[name] for name in ("swin_v1_t-dec_att_none",)}
    for name, manifest in manifests.items():
        model, exact = reference_model(manifest).to(device), None
        for arithmetic in ("float32", "bfloat16") if arguments.tiny else ("float32", "TF32", *HALF_DTYPES):
            allow_tf32(arithmetic == "TF32")
            rounded = copy.deepcopy(model).to(getattr(torch, arithmetic)) if arithmetic in HALF_DTYPES else model
            logits = {key: reference_logits(rounded, name, key) for key in ("square", "wide")}
            exact = exact or logits
            row = {"network": name, "arithmetic": arithmetic}
            for key, value in logits.items():
                row[f"{key}: largest difference / std"] = deviation(
                    value, references, manifest, f"{name}/{key}.logits"
                )
                difference = (value.sigmoid() - exact[key].sigmoid()).abs().mean().item()
                row[f"{key}: mean matte difference to float32"] = difference
            if arithmetic == "float32":
                row["within 2e-5"] = all(row[f"{key}: largest difference / std"] < 2e-5 for key in logits)
            record(row=row)
        del model, rounded
        free_memory(device)


def reference_model(manifest: dict) -> BiRefNetForImageSegmentation:
    weights = reference_weights.state_dict(manifest["state_dict"])
    state_dict = clean_state_dict({key: value.float() for key, value in weights.items()})
    config = BiRefNetConfig(**manifest["config"])
    return BiRefNetForImageSegmentation.from_pretrained(None, config=config, state_dict=state_dict).eval()


@torch.inference_mode()
def reference_logits(model, name: str, key: str) -> torch.Tensor:
    shape = {"square": (1, 128, 128), "wide": (2, 96, 160)}[key]
    if name in ("swin_v1_t", "swin_v1_l"):
        shape = (shape[0], 2 * shape[1], 2 * shape[2])
    return model(reference_weights.image(key, *shape).to(model.device)).logits.float().cpu()


def deviation(value: torch.Tensor, references: dict, manifest: dict, key: str) -> float:
    """Largest difference to the reference, in standard deviations of the reference."""
    if max(value.shape) > 64:  # the references keep every 4th pixel
        value = value[:, :, 1::4, 2::4]
    scale = manifest["standard_deviation"][key.split("/")[1]]
    return ((value - references[key]).abs().max() / scale).item()


def compare_foreground(record: Callable, device: torch.device):
    found = dict(np.load(REFERENCE_FOLDER / "foreground.npz"))
    image, alpha, expected = (torch.from_numpy(found[name]).float() for name in ("image", "alpha", "foreground"))
    foreground = estimate_foreground(image.to(device), alpha.to(device)).cpu()
    rows, columns = ([*range(0, side, 4), side - 1] for side in image.shape[-2:])  # what the reference keeps
    foreground = foreground[:, rows][:, :, columns]
    difference = 255 * (foreground - expected).abs().max().item()
    record(row={"foreground colours": "float32", "largest difference in gray levels": difference})


# ------------------------------------------------------------------------------------------------------------------
# Speed of the network
# ------------------------------------------------------------------------------------------------------------------

# Network, side, batch, dtypes, ways. Those that the goals name come first.
HALF, BOTH_WAYS = ["float16"], ["eager", "graph"]
SPEED_CASES = (
    ("general", 1024, 1, ["float16", "bfloat16", "float32"], BOTH_WAYS),
    ("general", 1024, 8, HALF, BOTH_WAYS),
    ("lite", 1024, 1, ["float16", "bfloat16", "float32"], BOTH_WAYS),
    ("lite", 1024, 8, HALF, BOTH_WAYS),
    ("lite", 2048, 1, HALF, BOTH_WAYS),
    ("lite", 2048, 8, HALF, BOTH_WAYS),
    ("general", 2048, 1, HALF, BOTH_WAYS),
    ("general", 2048, 8, HALF, BOTH_WAYS),
)
COMPILED_CASES = tuple(
    (model, side, batch, HALF, ["graph", "compiled"])
    for model, side, batch in (("general", 1024, 1), ("lite", 1024, 1), ("general", 1024, 8), ("lite", 1024, 8))
)
TINY_SPEED_CASES = (("lite", 64, 1, ["float32"], ["eager", "graph"]),)  # without a GPU the graph is an error
SPEED_COLUMNS = ("model", "side", "batch", "subject", "dtype", "milliseconds", "images_per_second", "memory_gib")
SPEED_COLUMNS += ("roofline_percent", "faster_than_plain", "matte_difference", "first_call_seconds", "error")


def speed_of_cases(arguments, record, cases):
    device = prepare(arguments, record)
    if arguments.tiny:
        make_networks_tiny()
    networks, loaded = {}, None
    for model, side, batch, dtypes, ways in cases:
        options = ["--models", model, "--device", arguments.device, "--dtypes", *dtypes, "--ways", *ways]
        options += ["--repeats", "1" if arguments.tiny else str(REPEATS)]
        # The plain formulation is the textbook's, as slow as the published code. Compiled cases need their time.
        options += ["--no-plain"] if "eager" not in ways or batch * side > 1024 else []
        options += ["--peer", arguments.peer] if arguments.peer else []
        chosen = speed.parse_arguments(options)
        chosen.no_memory = device.type == "cpu"
        if model != loaded or not networks.keys() >= set(dtypes):
            networks.clear()
            free_memory(device)
            networks.update(speed.load_networks(chosen, model))
            loaded = model
        for row in speed.measure_case(chosen, model, side, batch, networks):
            if "seconds" in row:
                row["milliseconds"] = 1000 * row["seconds"]
            record(row={name: row[name] for name in (*SPEED_COLUMNS, "seconds", "flop") if row.get(name) is not None})
        free_memory(device)


def network(arguments, record):
    """Lite and general, eager and as CUDA graphs, beside the plain formulation."""
    speed_of_cases(arguments, record, TINY_SPEED_CASES if arguments.tiny else SPEED_CASES)


def compiled(arguments, record):
    """The same under torch.compile, whose compilation takes most of the time."""
    speed_of_cases(arguments, record, TINY_SPEED_CASES if arguments.tiny else COMPILED_CASES)


# ------------------------------------------------------------------------------------------------------------------
# Deformable convolution in Triton
# ------------------------------------------------------------------------------------------------------------------


def kernel(arguments, record):
    """Deformable convolutions of a 1024² photo by PyTorch, torchvision and Triton; then the whole networks."""
    device = prepare(arguments, record)
    from birefnet.repository.deformable_triton_birefnet import TILING, Tiling, convolve_in_triton  # needs triton

    tilings = [TILING, Tiling(64, 256, 8, 3), Tiling(128, 128, 8, 3), Tiling(128, 256, 8, 2), Tiling(64, 128, 4, 3)]
    in_triton = {f"Triton {tuple(tiling)}": partial(convolve_in_triton, tiling=tiling) for tiling in tilings}
    chosen = dict(itertools.islice(in_triton.items(), 1))
    if arguments.tiny:
        convolutions(record, device, ("float32",), (3, 1), (4,), chosen, channels=8)
        return
    # Other tilings are tried for the largest kernel on the largest map, which takes most of the time.
    convolutions(record, device, ("float16",), (7,), (256,), in_triton)
    convolutions(record, device, ("float16",), (7, 3, 1), (128, 64, 32), chosen)
    networks_with_kernel(arguments, record)
    convolutions(record, device, ("bfloat16",), (7, 3, 1), (256,), chosen)


def convolutions(record, device, dtypes, kernel_sizes, sides, in_triton: dict, channels: int = 64):
    for dtype, kernel_size, side in itertools.product(dtypes, kernel_sizes, sides):
        operands = draw_operands(kernel_size, side, getattr(torch, dtype), device, channels)
        with torch.inference_mode():
            exact = deformable_convolution(*(operand.double() for operand in operands))
        for name, function in {"PyTorch": deformable_convolution, "torchvision": in_torchvision, **in_triton}.items():
            row = {"kernel size": kernel_size, "side": side, "dtype": dtype, "way": name}
            record(row=row | measure_convolution(function, operands, exact, device, 1 if channels < 64 else REPEATS))
        del operands, exact


def draw_operands(kernel_size: int, side: int, dtype: torch.dtype, device: torch.device, channels: int) -> list:
    """Map, offsets of a few pixels, modulator and weight of one branch of the pyramid pooling (256 channels)."""
    generator = torch.Generator().manual_seed(kernel_size)
    taps = kernel_size**2
    shapes = [(1, channels, side, side), (1, 2 * taps, side, side), (1, taps, side, side)]
    shapes.append((256 if channels >= 64 else 16, channels, kernel_size, kernel_size))
    operands = [torch.randn(shape, generator=generator) for shape in shapes]
    operands[1] *= 3
    operands[3] /= (channels * taps) ** 0.5
    return [operand.to(device, dtype).contiguous(memory_format=torch.channels_last) for operand in operands]


@torch.inference_mode()
def measure_convolution(function, operands, exact, device: torch.device, repeats: int) -> dict:
    try:
        error = (function(*operands).double() - exact).abs().max().item() / exact.abs().max().item()
        time_taken = milliseconds(partial(function, *operands), device, repeats)
    except Exception as error:  # any error of one way: the others go on
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"milliseconds": time_taken, "error / largest value": error}


def in_torchvision(hidden_states, offsets, modulator, weight):
    from torchvision.ops import deform_conv2d

    if hidden_states.dtype == torch.bfloat16:
        raise TypeError("torchvision has no bfloat16")
    mask = 2 * torch.sigmoid(modulator)
    return deform_conv2d(hidden_states, offsets, weight, padding=weight.shape[-1] // 2, mask=mask)


def networks_with_kernel(arguments, record):
    """The whole networks at 1024² in float16, without and with the kernel in turns."""
    for model, batch in (("general", 1), ("lite", 1), ("general", 8)):
        options = ["--models", model, "--device", arguments.device, "--dtypes", "float16", "--no-plain"]
        chosen = speed.parse_arguments([*options, "--ways", "eager", "graph", "--repeats", str(REPEATS)])
        networks = speed.load_networks(chosen, model)
        for devices in ((), (torch.device(arguments.device).type,)):
            hardware_birefnet.TRITON_DEVICES = devices
            for row in speed.measure_case(chosen, model, 1024, batch, networks):
                way = f"{row['subject']}, {'Triton' if devices else 'PyTorch'}"
                kept = {"network": f"{model}, batch {batch}", "way": way, "error": row["error"]}
                kept |= {"milliseconds": 1000 * row["seconds"]} if "seconds" in row else {}
                record(row={name: value for name, value in kept.items() if value is not None})
        hardware_birefnet.TRITON_DEVICES = ()
        del networks
        free_memory(torch.device(arguments.device))


# ------------------------------------------------------------------------------------------------------------------
# Foreground colours, training, files
# ------------------------------------------------------------------------------------------------------------------


def foreground(arguments, record):
    """Foreground colours of photos whose matte is soft at an edge, and of photos whose matte is soft everywhere."""
    device = prepare(arguments, record)
    sizes = ((48, 64),) if arguments.tiny else ((1024, 1024), (3000, 4000))
    for height, width in sizes:
        generator = torch.Generator().manual_seed(height)
        photo = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8).to(device)
        distance = torch.hypot(torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width))
        soft_edge = (20 * (0.6 - distance) + 0.5).clamp(0, 1)[None].to(device)
        everywhere = (0.5 + 0.4 * torch.cos(9 * distance))[None].to(device)
        for name, alpha in (("at an edge", soft_edge), ("everywhere", everywhere)):
            free_memory(device)
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            time_taken = milliseconds(partial(cut_out, photo, alpha), device, 1 if arguments.tiny else REPEATS)
            row = {"photo": f"{width}×{height}", "matte is soft": name, "milliseconds": time_taken}
            if device.type == "cuda":
                row["memory GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
            record(row=row)


def training(arguments, record):
    """One update of Swin-L at 1024² in bfloat16: memory and seconds."""
    device = prepare(arguments, record)
    if arguments.tiny:
        make_networks_tiny()
    for settings in training_memory.SETTINGS[1:]:
        free_memory(device)
        options = ["--device", arguments.device, *settings]
        chosen = training_memory.parse_arguments(options + (["--resolution", "64"] if arguments.tiny else []))
        peak, seconds = training_memory.measure(chosen)
        record(row={"settings": " ".join(settings), "peak GiB": peak / 2**30, "seconds per update": seconds})
        if arguments.tiny:
            return


def end_to_end_photos(arguments, record):
    """From JPEG files to PNG cut-outs, as `birefnet cutout`."""
    prepare(arguments, record)
    for network, batch in ((None, "1"), ("general", "1"), ("general", "8")):
        options = ["--device", arguments.device, "--batch-size", batch, *(["--model", network] if network else [])]
        if arguments.tiny:
            options += ["--photos", "2", "--megapixels", "0.01", "0.02", "--resolution", "64"]
        result = end_to_end.measure(end_to_end.parse_arguments(options))
        stages = {
            f"{stage}: ms per photo": 1000 * s / result["photos"] for stage, s in result["stage_seconds"].items()
        }
        rates = {name.replace("_", " "): result[name] for name in ("photos_per_second", "network_photos_per_second")}
        record(
            row={
                "network": network or "embedded",
                "dtype": result["dtype"],
                "batch": result["batch_size"],
                **rates,
                **stages,
            }
        )
        if arguments.tiny:
            return


# ------------------------------------------------------------------------------------------------------------------
# Table and picture
# ------------------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    """The rows as Markdown tables, one for each kind of row. Rows of one kind have the same first column."""
    tables = []
    for _, group in itertools.groupby(rows, lambda row: next(iter(row))):
        group = list(group)
        columns = list(dict.fromkeys(name for row in group for name in row))
        lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(shown(row.get(name, '-')) for name in columns)} |" for row in group]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def shown(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(results: dict, file: Path):
    """The network's time and memory in every case, as bars. Draws nothing if no case was measured."""
    rows = [row for name in ("network", "compiled") for row in results["parts"].get(name, {}).get("rows", [])]
    if any("seconds" in row for row in rows):
        picture.draw(rows, results["environment"], file)
