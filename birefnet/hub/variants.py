"""The table of published BiRefNet checkpoints, and `birefnet variants`.

The facts are in `variants.json` beside this file. Configurations, processor settings, the table in
docs/choosing-a-variant.md, model cards and tests come from it. `null` means that a fact is unknown.
"""

import dataclasses
import json
import sys
from pathlib import Path

from birefnet.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Variant:
    """
    One published checkpoint. An optional field is `None` if the fact is unknown.

    Attributes:
        name (`str`): The variant's name, such as `"HR-matting"`.
        title (`str`): The name in headings.
        official (`bool`): Whether it is one of the 16 checkpoints of BiRefNet's author.
        gated (`bool`): Whether users must accept terms on the Hub before downloading.
        repository (`str`): Repository on the Hub.
        aliases (`tuple[str]`): Other names, including former repositories.
        revision (`str`, *optional*): The commit that the facts describe, complete or abbreviated.
        file (`str`, *optional*): Name of the weights file in the repository.
        bytes (`int`, *optional*): Size of that file.
        sha256 (`str`, *optional*): Hash of that file.
        dtype (`str`, *optional*): Dtype of that file: `"float16"` or `"float32"`.
        parameters (`int`): Number of trainable parameters.
        config (`dict`): Fields of `BiRefNetConfig` that differ from the defaults.
        processor (`dict`): Settings of `BiRefNetImageProcessor` that differ from the defaults: a fixed `size`, or
            dynamic resizing with its limits.
        training_size (`dict`, *optional*): Height and width of the training pictures in pixels.
        purpose (`str`): The task, in its author's words.
        derived_from (`str`, *optional*): The checkpoint it was fine-tuned from, and how.
        license (`str`, *optional*): Declared terms of the weights.
        license_id (`str`, *optional*): The Hub's identifier of these terms.
        training_sets, validation_sets (`tuple[str]`, *optional*): Names of the data sets.
        metrics (`tuple[dict]`): Published results: `dataset`, `method`, `resolution` (width x height) and `values`.
        notes (`tuple[str]`): Remarks about these facts.
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
        """The file to download. If its name is unknown, this is the name that transformers looks for."""
        return self.file or "model.safetensors"

    @property
    def size_text(self):
        """The processor's size as text, such as `"1024 x 1024"` (width x height)."""
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


#: `VARIANTS`: name -> `Variant`. `KINDS`: kind of picture -> {"variant": name, "reason": sentence}.
#: `LICENSE_CAVEAT`: a remark about the official weights' licence.
VARIANTS, KINDS, LICENSE_CAVEAT = _read_table()


def get_variant(name):
    """
    Returns the [`Variant`] with a name, an alias or a Hub repository. Ignores case and the difference of `-` and `_`.

    Raises:
        ValueError: The table has no such variant. The message lists all variants.
    """

    def plain(text):
        return text.lower().replace("_", "-")

    for variant in VARIANTS.values():
        # general and general-fp32 have the same repository. Its name stands for the first row, general.
        names = (variant.name, variant.repository, variant.repository.split("/")[1], *variant.aliases)
        if plain(name) in map(plain, names):
            return variant
    raise ValueError(f"There is no variant {name!r}. The variants are {', '.join(VARIANTS)}.")


def variants_table():
    """Returns the table of docs/choosing-a-variant.md in Markdown."""
    lines = [
        "| variant | repository | network | input size | good for | not for |",
        "|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS.values():
        link = f"[{variant.repository}](https://huggingface.co/{variant.repository})"
        facts = (f"`{variant.name}`", link, variant.config["backbone"], variant.size_text)
        lines.append(f"| {' | '.join((*facts, variant.good_for, variant.avoid))} |")
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
    print(f"\n{LICENSE_CAVEAT}.\n`birefnet variants which` helps to choose.")


def _ask_kind():
    """Asks on the terminal for the kind of picture and returns the answer."""
    kinds = list(KINDS)
    print("What do the pictures show, or what are they for?")
    for number, kind in enumerate(kinds, start=1):
        print(f"  {number}  {kind}")
    answer = input("Number or name: ").strip()
    return kinds[int(answer) - 1] if answer.isdigit() and 1 <= int(answer) <= len(kinds) else answer


def choose_variant(kind):
    """
    Returns the name of the variant for a kind of picture, and the reason.

    Args:
        kind (`str`): The beginning or a word of one of `KINDS`.

    Raises:
        ValueError: No kind matches. The message lists all kinds.
    """
    wanted = kind.strip().lower()
    for known, choice in KINDS.items():
        if wanted and (known.lower().startswith(wanted) or wanted in known.lower().split()):
            return choice["variant"], choice["reason"]
    raise ValueError(f"There is no kind of picture {kind!r}. The kinds are {', '.join(KINDS)}.")


def add_arguments(parser):
    """Adds the arguments of `birefnet variants` to an `argparse` parser."""
    parser.description = "List the published checkpoints, or name the one for a kind of picture."
    parser.epilog = (
        "examples:\n"
        "  birefnet variants                    # the table\n"
        "  birefnet variants --json             # all known facts about each variant\n"
        "  birefnet variants which              # asks for the kind of picture\n"
        f"  birefnet variants which portrait     # one of: {', '.join(KINDS)}\n"
    )
    parser.add_argument("action", nargs="?", choices=["which"], help="name the variant for a kind of picture")
    parser.add_argument("kind", nargs="*", help="kind of picture (default: asks on the terminal)")
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
