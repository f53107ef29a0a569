"""Peak memory of training, as a Markdown table: of one setting, or of several common settings.

    python benchmarks/training_memory.py
    python benchmarks/training_memory.py --backbone swin_v1_t --resolution 512 --bf16 --gradient-checkpointing

Each measurement makes two updates with AdamW, which allocates its moments in the first. On a GPU, the peak is that of
PyTorch's allocator. On a CPU, it is the peak resident size of a separate process, less its size before the network was
built.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch

from birefnet.repository.configuration_birefnet import BiRefNetConfig
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation
from birefnet.training.low_rank import add_low_rank_adapters
from birefnet.training.trainer import freeze_statistics


SETTINGS = (
    [],
    ["--bf16"],
    ["--bf16", "--gradient-checkpointing"],
    ["--bf16", "--gradient-checkpointing", "--lora-rank", "8"],
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="swin_v1_l")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--lora-rank", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--one", action="store_true", help="measure this setting only, not the table")
    return parser.parse_args(arguments)


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build_model(arguments: argparse.Namespace, device: torch.device):
    model = BiRefNetForImageSegmentation(BiRefNetConfig(backbone=arguments.backbone))
    if arguments.lora_rank:
        add_low_rank_adapters(model, arguments.lora_rank)
    if arguments.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.to(device).train()
    if arguments.batch_size == 1:
        freeze_statistics(model)
    return model


def measure(arguments: argparse.Namespace) -> tuple[int, float]:
    """Peak bytes of two updates, and seconds of the second update."""
    device = torch.device(arguments.device)
    before = peak_bytes(device)
    model = build_model(arguments, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    shape = (arguments.batch_size, 3, arguments.resolution, arguments.resolution)
    images, labels = torch.randn(shape, device=device), torch.rand(shape, device=device)[:, :1].round()
    for _ in range(2):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
            loss = model(pixel_values=images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return peak_bytes(device) - before, time.perf_counter() - start


def row(arguments: argparse.Namespace) -> str:
    peak, seconds = measure(arguments)
    precision = "bfloat16" if arguments.bf16 else "float32"
    cells = (
        arguments.backbone,
        f"{arguments.resolution}²",
        str(arguments.batch_size),
        precision,
        "yes" if arguments.gradient_checkpointing else "no",
        str(arguments.lora_rank or "-"),
        f"{peak / 2**30:.1f}",
        f"{seconds:.2f}",
        arguments.device,
    )
    return f"| {' | '.join(cells)} |"


def main():
    arguments = parse_arguments()
    if arguments.one:
        print(row(arguments))
        return
    print("| backbone | size | batch | precision | checkpointing | LoRA rank | peak GiB | s per update | device |")
    print("|---|---|---|---|---|---|---|---|---|")
    shared = ["--backbone", arguments.backbone, "--resolution", str(arguments.resolution)]
    shared += ["--batch-size", str(arguments.batch_size), "--device", arguments.device, "--one"]
    for setting in SETTINGS:
        # A fresh process each: the peak of one would hide that of the next.
        done = subprocess.run([sys.executable, __file__, *shared, *setting], capture_output=True, text=True)
        print(
            done.stdout.strip() or f"| {' '.join(setting)} failed: {done.stderr.strip().splitlines()[-1]} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
