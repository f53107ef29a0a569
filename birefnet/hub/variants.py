"""The published BiRefNet checkpoints: one table of facts, and the way from a name to a model and its processor.

The facts are in `variants.json` beside this file; configurations, processor settings, README rows, model cards, the
command `birefnet variants` and the tests are made from it. A `null` there is a fact that nobody has established.

```python
>>> from birefnet.hub.variants import load_variant
>>> model, processor = load_variant("portrait", device="cuda")
```
"""

import dataclasses
import json
import sys
from pathlib import Path

from birefnet.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Variant:
    """
    One published checkpoint. Fields that may be `None` are then not established, and nothing is put in their place.

    Attributes:
        name (`str`): What users call it, such as `"HR-matting"`.
        title (`str`): Its name in a heading.
        official (`bool`): Whether it is one of the sixteen of BiRefNet's author.
        gated (`bool`): Whether its terms have to be accepted on the Hub before downloading.
        repository (`str`): Where it is on the Hub.
        aliases (`tuple[str]`): Other names of it, former repositories among them.
        revision (`str`, *optional*): The commit that the facts are of, complete or abbreviated.
        file (`str`, *optional*): The weights' name in the repository.
        bytes (`int`, *optional*): Size of that file.
        sha256 (`str`, *optional*): Hash of that file.
        dtype (`str`, *optional*): `"float16"` or `"float32"`, that of the file.
        parameters (`int`): Number of trainable parameters.
        config (`dict`): Fields of `BiRefNetConfig` that tell it from the defaults.
        processor (`dict`): Settings of `BiRefNetImageProcessor` that tell it from the defaults: a fixed `size`, or
            dynamic sizing and its bounds.
        training_size (`dict`, *optional*): Height and width in pixels that it was trained at.
        purpose (`str`): The task, in its author's words.
        derived_from (`str`, *optional*): What it was fine-tuned from, and how.
        license (`str`, *optional*): The weights' terms as declared; `license_id` is the Hub's identifier for them.
        training_sets, validation_sets (`tuple[str]`, *optional*): Names of the data sets.
        metrics (`tuple[dict]`): Published results: `dataset`, `method`, `resolution` (width x height) and `values`.
        notes (`tuple[str]`): What else to know about these facts.
        good_for, avoid (`str`): When to use it and when not to.
    """

    name: str
    title: str
    official: bool
    gated: bool
    repository: str
    aliases: tuple
    revision: str | None
    file: str | None
    bytes: int | None
    sha256: str | None
    dtype: str | None
    parameters: int
    config: dict
    processor: dict
    training_size: dict | None
    purpose: str
    derived_from: str | None
    license: str | None
    license_id: str | None
    training_sets: tuple | None
    validation_sets: tuple | None
    metrics: tuple
    notes: tuple
    good_for: str
    avoid: str

    @property
    def weights_file(self):
        """The file to fetch: where its name is not established, the one that transformers looks for."""
        return self.file or "model.safetensors"

    @property
    def size_text(self):
        """The processor's size in words, such as `"1024 x 1024"` (width x height)."""
        if self.processor.get("do_dynamic_resize"):
            return "{minimum_size} to {maximum_size}".format(**self.processor)
        return "{width} x {height}".format(**self.processor["size"])


def _read_table():
    table = json.loads(Path(__file__).with_name("variants.json").read_text(encoding="utf-8"))
    lists = ("aliases", "training_sets", "validation_sets", "metrics", "notes")
    variants = {}
    for entry in table["variants"]:
        frozen = {key: tuple(entry[key]) for key in lists if entry[key] is not None}
        variants[entry["name"]] = Variant(**{**entry, **frozen})
    return variants, table["kinds"], table["license_caveat"]


#: name -> `Variant`; kind of picture -> {"variant": name, "reason": sentence}; what to know about the MIT licence.
VARIANTS, KINDS, LICENSE_CAVEAT = _read_table()


def get_variant(name):
    """
    Returns the [`Variant`] of a name, an alias or a repository on the Hub; case, `-` and `_` make no difference.

    Raises:
        ValueError: if the table has no such variant; the message lists those that it has.
    """

    def plain(text):
        return text.lower().replace("_", "-")

    for variant in VARIANTS.values():
        # general-fp32 is in general's repository: the first of the table wins, which is what the repository holds.
        names = (variant.name, variant.repository, variant.repository.split("/")[1], *variant.aliases)
        if plain(name) in map(plain, names):
            return variant
    raise ValueError(f"There is no variant {name!r}; there are {', '.join(VARIANTS)}.")


def readme_rows():
    """The table of the official checkpoints for README.md, in Markdown."""
    lines = [
        "| variant | repository | network | size | good for |",
        "|---|---|---|---|---|",
    ]
    for variant in VARIANTS.values():
        link = f"[{variant.repository}](https://huggingface.co/{variant.repository})"
        network = variant.config["backbone"]
        lines.append(f"| `{variant.name}` | {link} | {network} | {variant.size_text} | {variant.good_for} |")
    return "\n".join(lines)


def _print_table():
    rows = [("variant", "network", "size", "dtype", "MB", "licence", "S-measure", "good for")]
    for variant in VARIANTS.values():
        measures = [row["values"]["Smeasure"] for row in variant.metrics if "Smeasure" in row["values"]]
        best = f"{measures[0]:.3f} {variant.metrics[0]['dataset']}" if measures else "-"
        megabytes = "-" if variant.bytes is None else f"{variant.bytes / 1e6:.0f}"
        facts = (variant.name, variant.config["backbone"], variant.size_text, variant.dtype or "-", megabytes)
        rows.append((*facts, variant.license_id or "-", best, variant.good_for))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*map(str.ljust, row, widths), row[-1]]))
    print(f"\n{LICENSE_CAVEAT}.\n'birefnet variants which' helps to choose.")


def _ask_kind():
    """Asks on the terminal which kind of picture it is; returns one of `KINDS`."""
    kinds = list(KINDS)
    print("What is in the pictures, or what are they for?")
    for number, kind in enumerate(kinds, start=1):
        print(f"  {number}  {kind}")
    answer = input("Number or name: ").strip()
    return kinds[int(answer) - 1] if answer.isdigit() and 1 <= int(answer) <= len(kinds) else answer


def choose_variant(kind):
    """
    Returns the name of the checkpoint for a kind of picture and the reason.

    Raises:
        ValueError: if the kind is none of `KINDS`, of which a beginning or any word of the name is enough.
    """
    wanted = kind.strip().lower()
    for known, choice in KINDS.items():
        if wanted and (known.lower().startswith(wanted) or wanted in known.lower().split()):
            return choice["variant"], choice["reason"]
    raise ValueError(f"There is no kind of picture {kind!r}; there are {', '.join(KINDS)}.")


def add_arguments(parser):
    """Adds the arguments of `birefnet variants` to an `argparse` parser."""
    parser.description = "Lists the published checkpoints, or names the one for a kind of picture."
    parser.epilog = (
        "examples:\n"
        "  birefnet variants                     the table\n"
        "  birefnet variants --json              all that is known about each\n"
        "  birefnet variants which               asks what the pictures are\n"
        f"  birefnet variants which portrait      one of: {', '.join(KINDS)}\n"
    )
    parser.add_argument("action", nargs="?", choices=["which"], help="name the checkpoint for a kind of picture")
    parser.add_argument("kind", nargs="*", help="the kind of picture; asked for on a terminal when left out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(arguments):
    """Runs `birefnet variants`; returns the exit code."""
    if arguments.action is None:
        if arguments.json:
            print(json.dumps([dataclasses.asdict(variant) for variant in VARIANTS.values()], indent=2))
        else:
            _print_table()
        return 0
    if not arguments.kind and not sys.stdin.isatty():
        raise UsageError(f"name a kind of picture: {', '.join(KINDS)}")
    try:
        name, reason = choose_variant(" ".join(arguments.kind) or _ask_kind())
    except ValueError as error:
        raise UsageError(str(error)) from error
    if arguments.json:
        print(json.dumps({"variant": name, "repository": VARIANTS[name].repository, "reason": reason}, indent=2))
    else:
        print(f"{name} ({VARIANTS[name].repository})\n{reason}")
    return 0
