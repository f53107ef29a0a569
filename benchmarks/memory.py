"""Peak memory of one forward pass, in addition to the memory before it (weights, libraries, interpreter)."""

import ctypes
import gc
import multiprocessing
import sys

import torch
from subjects import Subject


@torch.inference_mode()
def peak_on_gpu(run, pixel_values: torch.Tensor) -> int:
    """Peak bytes of PyTorch's allocator."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(pixel_values)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(subject: Subject, shape: tuple[int, ...], threads: int) -> int | None:
    """
    Peak bytes of a separate process, because a process does not return all memory that it has used before.

    Returns:
        Bytes, or `None` on systems other than Linux, which do not report them.

    Raises:
        MemoryError: The process was killed or ended without a result.
        RuntimeError: The subject failed in the process.
    """
    if sys.platform != "linux":
        return None
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_in_child, args=(subject, shape, threads, sender))
    process.start()
    sender.close()
    try:
        peak, error = receiver.recv()
    except EOFError:
        process.join()
        raise MemoryError(f"its process ended with code {process.exitcode}, probably out of memory") from None
    process.join()
    if error:
        raise RuntimeError(error)
    return peak


def _measure_in_child(subject: Subject, shape: tuple[int, ...], threads: int, sender):
    # The system kills this process first if memory runs out.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    torch.set_num_threads(threads)
    try:
        run = subject.build()
        with torch.inference_mode():
            if subject.kind != "onnx":  # an ONNX graph may have a fixed size
                run(torch.randn(1, 3, 64, 64))  # loads the kernels and starts the threads
            pixel_values = torch.randn(shape)
            gc.collect()
            give_back_freed_memory()
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets the peak
            before = _status("VmRSS")
            run(pixel_values)
        sender.send((_status("VmHWM") - before, None))
    except Exception as error:
        sender.send((None, f"{type(error).__name__}: {str(error).splitlines()[0]}"))
    finally:
        sender.close()


def give_back_freed_memory():
    """Return freed memory to the system, so that the forward pass cannot reuse it uncounted. glibc keeps it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    """Bytes that the kernel reports for this process: VmRSS is the present resident size, VmHWM its peak."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024
