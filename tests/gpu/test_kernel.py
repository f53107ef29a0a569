"""Deformable convolution in Triton, under Triton's interpreter, and where it is not used."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from birefnet.repository import hardware_birefnet


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not available on this system")
def test_kernel_under_the_interpreter():
    """A process of its own, because Triton decides at its import whether it interprets."""
    file = Path(__file__).with_name("interpreted_kernel.py")
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout
    assert " passed" in process.stdout and " failed" not in process.stdout


def test_kernel_is_not_used_where_it_has_not_been_measured():
    """Change this together with the numbers in docs/performance.md."""
    assert hardware_birefnet.TRITON_DEVICES == ()
    with torch.no_grad():
        assert not hardware_birefnet.runs_triton(torch.empty(1, device="meta"))


def test_without_triton_the_message_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "birefnet.repository.deformable_triton_birefnet", raising=False)
    with pytest.raises(ImportError, match="pip install triton"):
        importlib.import_module("birefnet.repository.deformable_triton_birefnet")
