"""Times exported files beside PyTorch, in turns, and names the fastest for this processor."""

import platform
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from birefnet.export.folders import load_network
from birefnet.inference.quantization import obstacle, quantize
from birefnet.inference.runtimes import FILES, RUNTIMES


ROUNDS = 5


@dataclass
class Timing:
    """One way to run the network."""

    name: str
    seconds: float  # median of the rounds
    matte_mean: float  # mean difference of the matte from that of PyTorch in float32

    def describe(self) -> str:
        return f"{self.name:32} {self.seconds:8.3f} s   mattes differ by {self.matte_mean:.1e} on average"


def measure(source, folder, photo=None, rounds: int = ROUNDS, others: dict | None = None) -> list[Timing]:
    """
    Times one photo, at the size in the folder's `preprocessor_config.json`.

    All ways run in turns, so that a slower minute of the machine falls on all of them. The first round is not counted.

    Args:
        source, photo: those of `export_model`.
        folder (`str` or `Path`): what it wrote; all files in it are timed.
        rounds (`int`): number of timed rounds.
        others (`dict`, *optional*): further networks by name, called as the exported ones.

    Returns:
        `list[Timing]`: the fastest first.
    """
    from transformers import AutoImageProcessor

    from birefnet.photos.drawing import draw_picture

    model, _ = load_network(source)
    processor = AutoImageProcessor.from_pretrained(str(folder))
    pixel_values = processor(photo or draw_picture(), return_tensors="pt")["pixel_values"]
    ways = {**_pytorch_ways(source, model), **_exported_ways(folder, model.config), **(others or {})}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    mattes = {}
    for _ in range(rounds + 1):
        for name, network in ways.items():
            start = time.perf_counter()
            with torch.inference_mode():
                logits = network(pixel_values).logits
            seconds[name].append(time.perf_counter() - start)
            mattes[name] = logits.float().sigmoid()
    exact = mattes["PyTorch float32"]
    timings = [
        Timing(name, statistics.median(seconds[name][1:]), (mattes[name] - exact).abs().mean().item()) for name in ways
    ]
    return sorted(timings, key=lambda timing: timing.seconds)


def _pytorch_ways(source, model) -> dict:
    ways = {"PyTorch float32": model}
    if torch.cpu._is_avx512_bf16_supported():
        ways["PyTorch bfloat16"] = load_network(source)[0].to(torch.bfloat16)
    if obstacle(torch.device("cpu")) is None:
        dtype = torch.bfloat16 if "PyTorch bfloat16" in ways else torch.float32
        ways["PyTorch int8"] = quantize(load_network(source)[0].to(dtype))
    return ways


def _exported_ways(folder, config) -> dict:
    """The folder's files by name. OpenVINO is timed in float32 and in the precision that it chooses itself."""
    titles = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "torch": "torch.export"}
    ways = {}
    for file_format, files in FILES.items():
        for dtype, file in files.items():
            path = Path(folder, file_format, file)
            if not path.is_file():
                continue
            load = partial(RUNTIMES[file_format], path, config)
            ways[f"{titles[file_format]} {dtype}"] = load()
            if file_format == "openvino":
                ways[f"{titles[file_format]} {dtype}, own precision"] = load(precision=None)
    return ways


def recommend(timings: list[Timing], exact: float = 1e-5) -> str:
    """A sentence that names the fastest way of all and the fastest of those whose mattes are PyTorch's."""
    fastest = timings[0]
    faithful = next(timing for timing in timings if timing.matte_mean <= exact)
    text = f"Fastest on this processor ({processor_name()}, {torch.get_num_threads()} threads): {fastest.name}"
    if faithful is fastest:
        return f"{text}."
    return f"{text}. Fastest with the mattes of float32: {faithful.name}."


def processor_name() -> str:
    """The processor's name as Linux gives it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
