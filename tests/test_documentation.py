"""README.md and docs/*.md: their Python runs, their commands parse, their links lead somewhere."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from birefnet import repository_folder
from birefnet.command_line import COMMANDS, build_parser


ROOT = repository_folder()
if not (ROOT / "docs").is_dir():
    pytest.skip("needs the checkout: a wheel has no docs/", allow_module_level=True)
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
DOCUMENTS += [ROOT / "benchmarks" / "README.md"]
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]

# A fenced block with the line above it, where `<!-- not run: REASON -->` may stand.
BLOCK = re.compile(r"^(?P<above>[^\n]*)\n+^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: (?P<reason>.{10,}) -->")
MOST_BLOCKS_NOT_RUN = 12

# Runs the blocks of each document in one namespace, as a reader pastes them one after the other.
RUNNER = """
import json, sys, traceback
failures = []
for name, blocks in json.load(open("blocks.json")).items():
    namespace = {"__name__": "__main__"}
    for line, code in blocks:
        try:
            exec(compile("\\n" * line + code, name, "exec"), namespace)
        except BaseException:
            failures.append(traceback.format_exc())
json.dump(failures, open("failures.json", "w"))
"""


def blocks_of(path: Path, language: str) -> list[tuple[int, str, str | None]]:
    """Returns line number, code, and why the block is not run (or None) of each block of a language."""
    text = "\n" + path.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        if match["language"] == language:
            reason = NOT_RUN.search(match["above"])
            found.append((text[: match.start("code")].count("\n") - 1, match["code"], reason and reason["reason"]))
    return found


# --- Python ---


@pytest.fixture
def folder_of_a_reader(tmp_path):
    """This repository's files, with photos and pairs of photo and mask beside them."""
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".json", ".safetensors") or path.name == "LICENSE":
            (tmp_path / path.name).symlink_to(path)
    rows, columns = np.mgrid[:96, :128]
    disc = (rows - 48) ** 2 + (columns - 64) ** 2 < 32**2
    photo = Image.fromarray((disc[..., None] * np.array([200, 120, 40]) + 20).astype(np.uint8))
    mask = Image.fromarray(disc.astype(np.uint8) * 255)
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        photo.save(tmp_path / name)
    for folder in ("photos", "my_photos/im"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(4):
            photo.save(tmp_path / folder / f"{number}.jpg")
    (tmp_path / "my_photos/gt").mkdir()
    for number in range(4):
        mask.save(tmp_path / "my_photos/gt" / f"{number}.png")
    return tmp_path


def test_every_python_block_runs(folder_of_a_reader):
    blocks = {
        name: [(line, code) for line, code, reason in blocks_of(path, "python") if not reason]
        for name, path in zip(NAMES, DOCUMENTS, strict=True)
    }
    assert len(blocks["README.md"]) >= 2
    (folder_of_a_reader / "blocks.json").write_text(json.dumps(blocks))
    (folder_of_a_reader / "runner.txt").write_text(RUNNER)
    environment = {
        "HF_MODULES_CACHE": str(folder_of_a_reader / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        [sys.executable, "runner.txt"],
        cwd=folder_of_a_reader,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    failures = json.loads((folder_of_a_reader / "failures.json").read_text())
    assert not failures, "\n\n".join(failures)
    with Image.open(folder_of_a_reader / "cutout.png") as cutout:  # what README.md's pipeline writes
        assert cutout.mode == "RGBA" and cutout.size == (128, 96)


def test_few_python_blocks_are_left_out():
    reasons = [reason for path in DOCUMENTS for _, _, reason in blocks_of(path, "python") if reason]
    assert len(reasons) <= MOST_BLOCKS_NOT_RUN, reasons


# --- Commands ---


def logical_lines(code: str) -> list[str]:
    """Joins lines that a backslash or an open quote continues."""
    lines, current = [], ""
    for line in code.splitlines():
        current += line + "\n"
        if line.endswith("\\"):
            current = current[:-2] + " "
            continue
        try:
            shlex.split(current, comments=True)
        except ValueError:  # an open quote
            continue
        lines.append(current)
        current = ""
    assert not current.strip(), f"a quote is never closed: {current!r}"
    return lines


def commands_of(code: str) -> list[list[str]]:
    """Returns the words of every command of a shell block. Variables that the block sets are put in."""
    variables, commands = {}, []
    for line in logical_lines(code):
        tokens = shlex.shlex(line, posix=True, punctuation_chars=True)
        tokens.whitespace_split = True
        command = []
        for token in [*tokens, ";"]:
            if set(token) <= set(";|&()"):
                commands += [command] if command else []
                command = []
            elif not command and (match := re.fullmatch(r"(\w+)=(.*)", token, re.DOTALL)):
                variables[match[1]] = match[2]
            elif match := re.fullmatch(r"\$(\w+)", token):
                command += shlex.split(variables.get(match[1], ""))
            else:
                command.append(token)
    return [without_redirections(command) for command in commands]


def without_redirections(command: list[str]) -> list[str]:
    words = iter(command)
    return [word for word in words if not (set(word) <= set("<>") and next(words, ""))]


def birefnet_arguments(command: list[str]) -> list[str] | None:
    """Returns the arguments of `birefnet …`, `python -m birefnet …` or `accelerate launch … -m birefnet …`."""
    program = Path(command[0]).name
    if program == "birefnet":
        return command[1:]
    if program in ("python", "python3", "accelerate") and ("-m", "birefnet") in pairwise(command):
        return command[command.index("birefnet") + 1 :]
    return None


def check_parses(arguments: list[str], where: str):
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        build_parser(command).parse_args(arguments)
    except SystemExit as leaving:
        assert leaving.code == 0, f"{where}: birefnet {shlex.join(arguments)}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_command_parses(path, capsys):
    for line, code, _ in blocks_of(path, "bash"):
        for command in commands_of(code):
            if (arguments := birefnet_arguments(command)) is not None:
                need_extra_of(arguments[0])
                check_parses(arguments, f"{path.name}:{line}")


def need_extra_of(command: str):
    if command == "serve":
        pytest.importorskip("fastapi", reason="the extra `serve` is not installed")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_of_help_parses(name, capsys):
    need_extra_of(name)
    parser = build_parser(name)
    epilog = next(action for action in parser._actions if action.dest == "command").choices[name].epilog
    lines = re.sub(r"\s*\\\n\s*", " ", epilog).splitlines()
    examples = [line.strip() for line in lines if re.match(rf"\s*birefnet {name}\b(?!.*…)", line)]
    assert examples
    for example in examples:
        command = re.split(r"\s{2,}", example)[0]  # an explanation may follow
        check_parses(birefnet_arguments(commands_of(command)[0]), f"birefnet {name} --help")


def test_shell_blocks_are_read_as_a_shell_does():
    assert commands_of(
        "common='--data x\n  --bf16'\nHOME=/x birefnet train $common --output 'a b' \\\n  --seed 1"
    ) == [["birefnet", "train", "--data", "x", "--bf16", "--output", "a b", "--seed", "1"]]
    assert commands_of("cat p.jpg | birefnet cutout - > out.png && echo done  # it is\n") == [
        ["cat", "p.jpg"],
        ["birefnet", "cutout", "-"],
        ["echo", "done"],
    ]


# --- Links, names and length ---


def slugs(path: Path) -> set[str]:
    """Returns the anchors of a document's headings, as GitHub and the Hub make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_relative_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = unquote(target).partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path.name} links to {target}, which does not exist"
        assert not anchor or anchor in slugs(linked), f"{path.name} links to {target}: no such heading"


def test_the_card_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_cards_speed_table_is_the_one_of_the_measurements():
    """After an edit of the table in docs/performance.md: python benchmarks/card.py"""
    spec = importlib.util.spec_from_file_location("card", ROOT / "benchmarks" / "card.py")
    card = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(card)
    rows = card.read_table(card.between_markers(card.SOURCE.read_text(encoding="utf-8")))
    expected = card.write_table(rows, card.CARD_COLUMNS)
    assert card.between_markers(card.CARD.read_text(encoding="utf-8")) == expected
    bars = [bar.get_width() for panel in card.draw(rows).axes for bar in panel.patches]
    assert sorted(bars) == sorted(float(row["seconds"]) for row in rows)


def test_files_and_classes_of_the_architecture_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = re.findall(r"`([\w/]+/)`", text)
    code = {name: (ROOT / name).read_text(encoding="utf-8") for name in re.findall(r"(?<![*\w/])\w[\w/]*\.py\b", text)}
    assert len(folders) > 5 and all((ROOT / folder).is_dir() for folder in folders)

    def defined_in(files):
        return set(re.findall(r"^(?:class|def) (\w+)", "\n".join(code[file] for file in files), re.MULTILINE))

    rows = [line.split("|") for line in text.splitlines() if re.search(r"_birefnet\.py` \|$", line)]
    for *_, names, files, _ in rows:  # the table of stages: classes or functions, and their files
        names, files = (set(re.findall(r"`([\w.]+)`", cell)) for cell in (names, files))
        assert names and names <= defined_in(files), (names, files)
    assert len(rows) > 10
    boxes = set(re.findall(r"[\[\"]([A-Z]\w*[a-z][A-Z]\w+)", text))  # class names that begin a box
    assert "BiRefNetDecoder" in boxes and boxes <= defined_in(code), boxes - defined_in(code)
    attributes = set(re.findall(r"`(\w+)`", text))  # also methods and the checkpoints' module names
    assert not [name for name in attributes if not re.search(rf"\b{name}\b", "\n".join(code.values()))]
