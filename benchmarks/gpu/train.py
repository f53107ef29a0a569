"""Continues the training of a small network on a GPU, for as long as a loan lasts.

    bash benchmarks/gpu/train.sh --data 'out/carry/*/train.parquet' --validation-data out/carry/1/validation.parquet
    bash benchmarks/gpu/train.sh --device cpu --tiny --data … --validation-data …      # to test this script
    python benchmarks/gpu/train.py --assemble out/train --output better                # a model folder from the result

All photos are in GPU memory, where batches are flipped and cropped, and with `--color` changed in colour. The network
is compiled and computes in bfloat16. The learning rate follows a cosine over the time that there is, whatever the
number of updates. The moving average of the weights is validated at intervals, and the best one is kept:
`weights-*.safetensors` (float16), `curve.json` and `curve.png` are written anew after each validation.
"""

import argparse
import time
from pathlib import Path

from project import make_importable


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", help="files of pack.py, or anything that `birefnet train` takes")
    parser.add_argument("--validation-data", nargs="+")
    parser.add_argument("--model", help="folder to continue from; default: the embedded weights")
    parser.add_argument("--output", type=Path, default=Path("out/train"))
    parser.add_argument("--seconds", type=float, default=460, help="time in all, imports included (default: 460)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--stored-side", type=int, default=320, help="side of the squared photos in memory")
    parser.add_argument("--size", type=int, help="side of the training pictures; default: the model's input size")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="highest; of all but the backbone")
    parser.add_argument("--backbone-learning-rate", type=float, default=2e-4)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--max-grad-norm", type=float, default=100.0)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--crop", type=float, default=0.7, help="smallest share of a side that a crop keeps")
    parser.add_argument("--color", type=float, default=0.0, help="largest change of brightness, contrast, saturation")
    parser.add_argument("--validate-every", type=float, default=45, help="seconds between validations")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="four updates of two small pictures, to test this script")
    parser.add_argument("--assemble", type=Path, metavar="FOLDER", help="only make a model folder of these results")
    chosen = parser.parse_args(arguments)
    if chosen.assemble is None and not (chosen.data and chosen.validation_data):
        parser.error("--data and --validation-data are needed")
    if chosen.tiny:
        chosen.size, chosen.batch_size, chosen.stored_side, chosen.compile = 64, 2, 64, False
    return chosen


def main(arguments: argparse.Namespace):
    start = time.monotonic()
    make_importable()
    import fast_training

    if arguments.assemble:
        fast_training.assemble(arguments.assemble, arguments.output, arguments.model)
    else:
        fast_training.Training(arguments, end=start + arguments.seconds).run()


if __name__ == "__main__":
    main(parse_arguments())
