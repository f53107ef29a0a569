"""Makes the project and the other benchmarks importable where the project is not installed, as on a lent GPU."""

import importlib.util
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def make_importable():
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
    if importlib.util.find_spec("birefnet.repository") is None:  # the root folder is this package
        options = {"submodule_search_locations": [str(ROOT)]}
        spec = importlib.util.spec_from_file_location("birefnet.repository", ROOT / "__init__.py", **options)
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
