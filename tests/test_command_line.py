"""birefnet.command_line: sub-commands, exit codes, and fast help."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

import birefnet
from birefnet import command_line
from birefnet.command_line import main
from birefnet.errors import CommandError, UsageError


@pytest.fixture
def stand_in(monkeypatch):
    """A function that replaces the sub-command "cutout"."""

    def set_run(run):
        module = SimpleNamespace(add_arguments=lambda parser: parser.add_argument("--number", type=int), run=run)
        monkeypatch.setattr(command_line.importlib, "import_module", lambda name: module)

    return set_run


def test_the_sub_command_gets_its_arguments_and_gives_the_exit_code(stand_in):
    stand_in(lambda arguments: arguments.number)
    assert main(["cutout", "--number", "7"]) == 7


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (CommandError("no such model"), 1, "birefnet cutout: error: no such model\n"),
        (UsageError("no such device"), 2, "birefnet cutout: error: no such device\n"),
        (KeyboardInterrupt(), 130, "birefnet cutout: interrupted\n"),
    ],
)
def test_errors_become_messages_and_exit_codes(stand_in, capsys, error, code, message):
    def run(arguments):
        raise error

    stand_in(run)
    assert main(["cutout"]) == code
    assert capsys.readouterr() == ("", message)


def test_an_unexpected_error_is_not_hidden(stand_in):
    stand_in(lambda arguments: {}["a defect"])
    with pytest.raises(KeyError):
        main(["cutout"])


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["cutout"], ["cutout", "a.jpg", "--unknown"]])
def test_wrong_arguments_leave_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    assert "usage: birefnet" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"birefnet {birefnet.__version__}\n"


def test_help_lists_every_sub_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in command_line.COMMANDS)


def test_help_answers_without_the_heavy_imports():
    code = (
        "import sys; from birefnet.command_line import build_parser\n"
        "build_parser('cutout').parse_args(['cutout', 'a.jpg'])\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'tqdm') if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert process.stdout == "[]\n"


def test_python_m_birefnet_is_the_command_and_shows_examples():
    command = [sys.executable, "-m", "birefnet", "cutout", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0 and process.stderr == ""
    assert "examples:\n  birefnet cutout photo.jpg" in process.stdout


def test_a_reader_that_leaves_early_is_no_traceback(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from types import SimpleNamespace; from birefnet import command_line\n"
        "module = SimpleNamespace(add_arguments=lambda parser: None)\n"
        "module.run = lambda arguments: [print('line' * 99) for _ in range(9999)]\n"
        "command_line.importlib.import_module = lambda name: module\n"
        "sys.exit(command_line.main(['cutout']))\n"
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1
    process.stderr.close()
