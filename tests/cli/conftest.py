"""What the tests of the command line share: run a command, and demand one clear line for a mistake."""

import pytest

from spectralmoe.cli.app import run


@pytest.fixture
def call(capsys):
    """Run one command in this process: (exit code, stdout, stderr)."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run_command


@pytest.fixture
def refused(call):
    """Run a command that must end with exit code 2 and one line on stderr; returns the line."""

    def run_command(*arguments: object) -> str:
        code, out, err = call(*arguments)
        assert code == 2, (out, err)
        *progress, line = err.splitlines()
        assert line.startswith("error: ")
        assert all("%  " in other or other.startswith("note: ") for other in progress), err
        return line

    return run_command
