"""Speed and memory of BiRefNet: this project, the plain formulation, the published code, ONNX Runtime.

    python benchmarks/speed.py                                              # 1024², batch 1, on this machine's device
    python benchmarks/speed.py --models lite --sizes 512 1024 2048 --batches 1 8
    python benchmarks/speed.py --peer CHECKOUT --onnx FILE --json out/speed.json --picture out/speed.png
    python benchmarks/speed.py --models . --sizes 448 --dtypes float32 --no-plain --onnx FILE   # the embedded network

All subjects of a case run in turns in one process, so a disturbance of the machine affects all of them alike. A matrix
product runs in turn with them. Its rate is the roofline.
"""

import argparse
import copy
import datetime
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

import torch
import transformers
from memory import peak_on_cpu, peak_on_gpu
from roofline import MatrixProduct, count_flop
from subjects import CAPTURED, COMPILED, PLAIN, PROJECT, PUBLISHED, Subject, configuration, load_model

from birefnet.inference.quantization import obstacle
from birefnet.repository.hardware_birefnet import compute_plan


PAUSE = 0.1  # seconds
COLUMNS = (
    ("subject", "{subject}"),
    ("dtype", "{dtype}"),
    ("arithmetic", "{arithmetic}"),
    ("seconds", "{seconds:.4f}"),
    ("images/s", "{images_per_second:.2f}"),
    ("× plain", "{faster_than_plain:.2f}"),
    ("× plain float32", "{faster_than_plain_float32:.2f}"),
    ("× published float32", "{faster_than_published_float32:.2f}"),
    ("memory GiB", "{memory_gib:.2f}"),
    ("% of plain", "{memory_percent_of_plain:.0f}"),
    ("% of published", "{memory_percent_of_published:.0f}"),
    ("% of roofline", "{roofline_percent:.0f}"),
    ("matte difference", "{matte_difference:.1e}"),
)


WAYS = {"eager": PROJECT, "graph": CAPTURED, "compiled": COMPILED}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["lite", "general"],
        help="lite, general (random weights), or folders of weights",
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024], help="sides in pixels, multiples of 32")
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float32", "bfloat16", "float16", "int8"],
        help="dtypes of the weights; default: float32 and bfloat16, on a GPU also float16, on a CPU with int8 "
        "arithmetic also int8 (this project only)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=["eager"],
        help="how this project runs: eager (default), graph (`birefnet.compile`) or compiled (torch.compile, on a GPU "
        "with CUDA graphs)",
    )
    parser.add_argument("--no-plain", action="store_true", help="do not measure the plain formulation")
    parser.add_argument("--peer", metavar="CHECKOUT", help="folder of the published code, from GitHub")
    parser.add_argument(
        "--onnx", metavar="FILE", nargs="+", default=[], help="ONNX exports of the model that --models names"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each subject")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--picture", metavar="FILE", type=Path)
    chosen = parser.parse_args(arguments)
    if chosen.onnx and len(chosen.models) > 1:
        parser.error("--onnx: name the one model of these files by --models")
    if missing := [file for file in chosen.onnx if not Path(file).is_file()]:
        parser.error(f"--onnx: no file {missing[0]}")
    if wrong := [side for side in chosen.sizes if side < 32 or side % 32]:
        parser.error(f"--sizes: {wrong[0]} is not a multiple of 32")
    if min(chosen.repeats, chosen.threads, *chosen.batches) < 1:
        parser.error("--repeats, --threads, --batches: at least 1")
    no_int8 = obstacle(torch.device(chosen.device))
    if chosen.dtypes is None:
        chosen.dtypes = ["float32", "bfloat16"]
        chosen.dtypes += ["float16"] if chosen.device.startswith("cuda") else [] if no_int8 else ["int8"]
    elif "int8" in chosen.dtypes and no_int8:
        parser.error(f"--dtypes: {no_int8}")
    return chosen


def environment(device: torch.device, threads: int) -> dict:
    """The conditions of the measurement."""
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "device": torch.cuda.get_device_name(device) if on_gpu else processor_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def subjects_of(arguments: argparse.Namespace, model: str) -> list[Subject]:
    subjects = []
    for dtype in arguments.dtypes:
        if dtype == "int8":  # only this project has int8
            subjects.append(Subject(PROJECT, model, dtype, arguments.device))
            continue
        kinds = [*(WAYS[way] for way in arguments.ways), *([] if arguments.no_plain else [PLAIN])]
        subjects += [Subject(kind, model, dtype, arguments.device) for kind in kinds]
        if arguments.peer:
            subjects.append(Subject(PUBLISHED, model, dtype, arguments.device, arguments.peer))
    return subjects + [Subject("onnx", model, "float32", arguments.device, file) for file in arguments.onnx]


def measure_case(
    arguments: argparse.Namespace, model: str, side: int, batch: int, networks: dict | None = None
) -> list[dict]:
    """One row for each subject at one size and batch. `networks` holds the model in each dtype, if it is loaded."""
    device = torch.device(arguments.device)
    pixel_values = draw_images(batch, side).to(device)
    try:
        flop = count_flop(configuration(model), batch, side)
    except ValueError:  # the plain formulation does not have this network, so its row has no roofline
        flop = None
    networks = networks or load_networks(arguments, model)
    runs, rows, mattes = {}, [], {}
    for subject in subjects_of(arguments, model):
        row = {"model": model, "side": side, "batch": batch, "subject": subject.name, "dtype": subject.dtype}
        row |= {"arithmetic": arithmetic_of(subject, device), "flop": flop, "error": None, "times": []}
        rows.append(row)
        try:
            # Measure memory first, in a separate process: a subject that runs out of memory fails there.
            if not arguments.no_memory and device.type == "cpu":
                row["memory"] = peak_on_cpu(subject, tuple(pixel_values.shape), arguments.threads)
            run = subject.build(networks.get(subject.dtype))
            start = time.perf_counter()
            is_replayed = device.type == "cuda" and subject.kind in (CAPTURED, COMPILED)
            if is_replayed:  # its memory is allocated once, in the first calls
                row["memory"] = max(peak_on_gpu(run, pixel_values) for _ in range(3))
            mattes[subject] = run_once(run, pixel_values).float().sigmoid().cpu()
            row["first_call_seconds"] = time.perf_counter() - start
            if not arguments.no_memory and device.type == "cuda" and not is_replayed:
                row["memory"] = peak_on_gpu(run, pixel_values)
            runs[subject] = (run, row)
        except Exception as error:  # any error: report it in the table and continue with the other subjects
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    arithmetics = {row["arithmetic"] for row in rows} - {"int8"}
    products = {name: MatrixProduct(device, getattr(torch, name)) for name in sorted(arithmetics)}
    rates = run_in_turns(list(runs.values()), products, pixel_values, arguments.repeats)
    compare_mattes(mattes, {subject: row for subject, (_, row) in runs.items()})
    for row in rows:
        derive(row, rows, rates)
    return rows


def load_networks(arguments: argparse.Namespace, model: str) -> dict:
    """The model in each dtype. Its weights are read or drawn once."""
    exact = load_model(model, "float32", arguments.device)
    networks = {"float32": exact}
    for dtype in set(arguments.dtypes) - {"float32"}:
        is_int8 = dtype == "int8"
        networks[dtype] = load_model(model, dtype, arguments.device) if is_int8 else as_dtype(exact, dtype)
    return networks


def as_dtype(model, dtype: str):
    return copy.deepcopy(model).to(getattr(torch, dtype))


def arithmetic_of(subject: Subject, device: torch.device) -> str:
    """The dtype of a subject's matrix products. This project does not always compute in the dtype of the weights."""
    if subject.kind != PROJECT or subject.dtype == "int8":
        return subject.dtype
    return str(compute_plan(device, getattr(torch, subject.dtype)).arithmetic).removeprefix("torch.")


def draw_images(batch: int, side: int) -> torch.Tensor:
    """Normalised images of smooth colours, a disc and some noise, (batch, 3, side, side)."""
    generator = torch.Generator().manual_seed(side)
    coarse = torch.randn(batch, 3, 8, 8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    place = torch.linspace(-1, 1, side)
    images = images + 1.5 * ((place[:, None] ** 2 + place**2) < 0.3)
    return images + 0.2 * torch.randn(images.shape, generator=generator)


@torch.inference_mode()
def run_once(run, *inputs) -> torch.Tensor:
    result = run(*inputs)
    if result.is_cuda:
        torch.cuda.synchronize()
    return result


def run_in_turns(runs: list, products: dict[str, MatrixProduct], pixel_values, repeats: int) -> dict[str, float]:
    """
    Fill the rows' `times`, in alternating order. Returns the rates of the matrix products in FLOP/s.

    Each run starts after a pause. The threads of PyTorch and of ONNX Runtime wait actively for a while after a run,
    and would take the cores from the next subject.
    """
    product_times = {dtype: [] for dtype in products}
    for product in products.values():
        run_once(product)
    for turn in range(repeats):
        for run, row in runs[:: 1 if turn % 2 == 0 else -1]:
            time.sleep(PAUSE)
            start = time.perf_counter()
            run_once(run, pixel_values)
            row["times"].append(time.perf_counter() - start)
        for dtype, product in products.items():
            for _ in range(3):
                start = time.perf_counter()
                run_once(product)
                product_times[dtype].append(time.perf_counter() - start)
    return {dtype: products[dtype].flop / statistics.median(times) for dtype, times in product_times.items()}


def compare_mattes(mattes: dict[Subject, torch.Tensor], rows: dict[Subject, dict]):
    """
    Mean absolute difference of each matte from the plain formulation's in float32.

    ONNX files have weights of their own and are not compared.
    """
    reference = next((s for kind in (PLAIN, PROJECT) for s in mattes if (s.kind, s.dtype) == (kind, "float32")), None)
    for subject, matte in mattes.items():
        if reference is not None and subject != reference and subject.kind != "onnx":
            rows[subject]["matte_difference"] = (matte - mattes[reference]).abs().mean().item()


def derive(row: dict, rows: list[dict], rates: dict[str, float]):
    """Compute a row's ratios from its own measurements and those of the other rows."""

    def other(subject, dtype):
        return next((r for r in rows if (r["subject"], r["dtype"]) == (subject, dtype) and r["times"]), None)

    if row["times"]:
        row["seconds"] = statistics.median(row["times"])
        row["images_per_second"] = row["batch"] / row["seconds"]
        row["matrix_product_rate"] = rates.get(row["arithmetic"])
        if row["matrix_product_rate"] and row["flop"]:
            row["roofline_percent"] = 100 * row["flop"] / row["seconds"] / row["matrix_product_rate"]
        for name, subject, dtype in (
            ("faster_than_plain", PLAIN, row["dtype"]),
            ("faster_than_plain_float32", PLAIN, "float32"),
            ("faster_than_published_float32", PUBLISHED, "float32"),
        ):
            if reference := other(subject, dtype):
                row[name] = statistics.median(reference["times"]) / row["seconds"]
    if row.get("memory") is not None:
        row["memory_gib"] = row["memory"] / 2**30
        for name, subject in (("plain", PLAIN), ("published", PUBLISHED)):
            reference = other(subject, row["dtype"])
            if reference and reference.get("memory"):
                row[f"memory_percent_of_{name}"] = 100 * row["memory"] / reference["memory"]


def table(rows: list[dict]) -> str:
    """The rows as an aligned Markdown table without empty columns."""
    cells = [[cell(row, template) for _, template in COLUMNS] for row in rows]
    shown = [i for i in range(len(COLUMNS)) if any(line[i] != "-" for line in cells)]
    lines = [[COLUMNS[i][0] for i in shown], *([line[i] for i in shown] for line in cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    lines.insert(1, ["-" * width for width in widths])
    text = "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
    errors = [f"{row['subject']}, {row['dtype']}: {row['error']}" for row in rows if row["error"]]
    return "\n".join([text, *errors])


def cell(row: dict, template: str) -> str:
    try:
        return template.format(**row)
    except (KeyError, TypeError):  # not measured
        return "-"


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    about = environment(torch.device(arguments.device), arguments.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    rows = []
    for model in arguments.models:
        networks = load_networks(arguments, model)
        for side in arguments.sizes:
            for batch in arguments.batches:
                case = measure_case(arguments, model, side, batch, networks)
                rows += case
                arithmetic = f": {case[0]['flop'] / 1e9:.0f} GFLOP" if case[0]["flop"] else ""
                print(f"\n{model}, {side}², batch {batch}{arithmetic}\n{table(case)}", flush=True)
                if arguments.json:  # after every case, because a long run may be interrupted
                    arguments.json.parent.mkdir(parents=True, exist_ok=True)
                    arguments.json.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    if arguments.picture:
        from picture import draw

        arguments.picture.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, about, arguments.picture)


if __name__ == "__main__":
    main()
