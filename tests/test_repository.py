"""The root folder as a Hub repository, as a package and as a wheel. Each test uses a fresh process."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import birefnet
from birefnet import repository_folder

from .hub_server import LoopbackHub


ROOT = repository_folder()
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*command, folder, **environment):
    process = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process


@pytest.fixture
def photo(tmp_path):
    """A bright disc on a dark background."""
    rows, columns = np.mgrid[:90, :120]
    disc = ((rows - 45) ** 2 + (columns - 60) ** 2 < 30**2)[..., None] * np.array([200, 120, 40])
    path = tmp_path / "photo.png"
    Image.fromarray((disc + 20).astype(np.uint8)).save(path)
    return path


def test_loads_from_the_folder_with_remote_code_and_without_a_warning(tmp_path, photo):
    script = f"""
import json, sys
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageSegmentation,
                          AutoModelForSemanticSegmentation)
options = {{"trust_remote_code": True}}
folder = {str(ROOT)!r}
config = AutoConfig.from_pretrained(folder, **options)
models = [cls.from_pretrained(folder, **options).eval()
          for cls in (AutoModelForImageSegmentation, AutoModel, AutoModelForSemanticSegmentation)]
processor = AutoImageProcessor.from_pretrained(folder, **options)
inputs = processor({str(photo)!r}, return_tensors="pt")
import torch
with torch.inference_mode():
    outputs = [model(**inputs) for model in models]
assert all(torch.equal(outputs[0].logits, output.logits) for output in outputs)
matte = processor.post_process_alpha_matte(outputs[0], target_sizes=[(90, 120)])[0]
print(json.dumps({{"type": config.model_type, "dtype": str(models[0].dtype), "shape": list(matte.shape),
                  "low": matte.min().item(), "high": matte.max().item()}}))
"""
    process = run(sys.executable, "-c", script, folder=tmp_path, HF_MODULES_CACHE=tmp_path / "modules")
    report = json.loads(process.stdout.splitlines()[-1])
    assert report["type"] == "birefnet" and report["shape"] == [90, 120]
    assert 0 <= report["low"] < report["high"] <= 1
    # The file is float16. The configuration says float32, which is fast on every CPU.
    assert report["dtype"] == "torch.float32"
    messages = re.sub(r"Loading weights:[^\r\n]*", "", process.stderr).strip()
    assert messages == ""


def test_what_transformers_pushes_runs_from_the_hub(tiny_model_folder, tmp_path, photo):
    """`push_to_hub` of model and processor uploads the code. A process with empty caches needs nothing else."""
    push = f"""
from transformers import AutoImageProcessor, AutoModelForImageSegmentation
for auto_class in (AutoModelForImageSegmentation, AutoImageProcessor):
    auto_class.from_pretrained({str(tiny_model_folder)!r}, trust_remote_code=True).push_to_hub("author/net")
"""
    cut_out = f"""
import sys
from transformers import pipeline
remove_background = pipeline(model=sys.argv[1], trust_remote_code=True, device="cpu")
remove_background({str(photo)!r}).save(sys.argv[2])
"""
    with LoopbackHub(tmp_path / "hub") as hub:
        run(sys.executable, "-c", push, folder=tmp_path, **hub.environment(tmp_path / "author"))
        results = []
        for number, source in enumerate(("author/net", tiny_model_folder)):
            environment = hub.environment(tmp_path / f"user{number}")
            run(sys.executable, "-c", cut_out, source, f"{number}.png", folder=tmp_path, **environment)
            results.append(Image.open(tmp_path / f"{number}.png"))
    assert results[0].mode == "RGBA" and results[0].tobytes() == results[1].tobytes()


def test_is_importable_as_a_package(tmp_path):
    script = f"""
import sys
from birefnet.inference.registration import register_model
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation
from transformers import AutoModelForImageSegmentation
register_model()
print(sys.modules[BiRefNetForImageSegmentation.__module__].__file__)
model = AutoModelForImageSegmentation.from_pretrained({str(ROOT)!r})  # registered: needs no remote code
assert type(model) is BiRefNetForImageSegmentation
print(sum(parameter.numel() for parameter in model.parameters()))
"""
    file, parameters = run(sys.executable, "-c", script, folder=tmp_path).stdout.split()
    assert Path(file).parent == ROOT
    assert int(parameters) < 30e6
    assert (ROOT / "model.safetensors").stat().st_size <= 64 * 2**20


def test_wheel_in_a_clean_environment_finds_the_embedded_weights(tmp_path, photo):
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("needs the checkout that the wheel is built from")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", ROOT, "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "wheel", folder=tmp_path)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    clean = tmp_path / "clean"
    run(sys.executable, "-m", "venv", "--without-pip", clean, folder=tmp_path)
    python = clean / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, folder=tmp_path)
    # A path file adds this environment's dependencies, but not its editable install of the project.
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path).stdout.strip()
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    where = run(python, "-c", "import birefnet; print(birefnet.repository_folder())", folder=tmp_path).stdout.strip()
    assert Path(where).is_relative_to(clean)
    command = clean / "bin" / "birefnet"
    assert run(command, "--version", folder=tmp_path).stdout.strip().endswith(birefnet.__version__)
    run(command, "cutout", photo, "-o", tmp_path / "out", folder=tmp_path, HF_MODULES_CACHE=tmp_path / "modules")
    (cutout,) = (tmp_path / "out").iterdir()
    with Image.open(cutout) as picture:
        assert picture.size == (120, 90) and picture.mode == "RGBA"


def test_the_oldest_constraints_are_the_lower_bounds():
    if not (ROOT / "constraints-oldest.txt").is_file():
        pytest.skip("needs the checkout")
    constraints = dict(
        re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE)
    )
    bounds = re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    bounds = {name.replace("-", "_"): version for name, version in reversed(bounds)}  # extras may need newer ones
    constraints = {name.replace("-", "_"): version for name, version in constraints.items()}
    wrong = {
        name: (bound, constraints[name])
        for name, bound in bounds.items()
        if name in constraints and not f"{constraints[name]}.0".startswith(f"{bound}.")
    }
    assert not wrong
    assert {"torch", "transformers", "numpy", "pillow", "safetensors", "huggingface_hub", "tqdm"} <= set(constraints)


def test_shipped_files_are_flat_and_import_nothing_unexpected():
    allowed = {"torch", "numpy", "PIL", "transformers"}
    for path in sorted(ROOT.glob("*_birefnet.py")):
        for line in path.read_text().splitlines():
            if match := re.match(r"(?:from|import) ([A-Za-z_.][\w.]*)", line):
                name = match.group(1)
                if name.startswith("."):
                    assert re.fullmatch(r"\.\w+_birefnet", name), f"{path.name}: {line}"
                else:
                    top = name.split(".")[0]
                    assert top in allowed or top in sys.stdlib_module_names, f"{path.name}: {line}"
