"""Directives for what is written elsewhere: ``{field}``, ``{claims}``, ``{commands}`` and ``{versions}``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import typer
from claims import claim_table
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata
from versions import version_table

from spectralmoe.cli.app import app as application
from spectralmoe.experiments.cards.field import FIELD, field_table

__all__ = ["command_lines", "setup"]


class Lines(SphinxDirective):
    """Lines of Markdown in the place of the directive."""

    reads: ClassVar[tuple[str, ...]] = ()
    """Files of the repository that the lines come from: when one changes, the page is written anew."""

    def lines(self) -> list[str]:
        """The lines."""
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        """What the lines say."""
        for pattern in self.reads:
            for path in sorted(Path(self.env.srcdir).glob(pattern)):
                self.env.note_dependency(str(path))
        place: Any = nodes.Element()
        self.state.nested_parse(
            StringList(self.lines(), self.env.docname), self.content_offset, place, match_titles=True
        )
        return list(place.children)


class Field(Lines):
    """The methods of papers, with files, rows and verdicts."""

    reads = ("src/spectralmoe/experiments/cards/field.py",)

    def lines(self) -> list[str]:
        """As ``spectralmoe list --markdown`` prints them."""
        return field_table("../")


class Claims(Lines):
    """The claims of all cards."""

    reads = ("papers/*/README.md",)

    def lines(self) -> list[str]:
        """One table."""
        return claim_table(Path(self.env.srcdir) / "papers", [item.card for item in FIELD], "../papers")


class Versions(Lines):
    """The packages that this one asks for, with their oldest and their tested versions."""

    reads = ("pyproject.toml", "constraints*.txt")

    def lines(self) -> list[str]:
        """One table."""
        return version_table(Path(self.env.srcdir))


class Commands(Lines):
    """Every verb of the command line with its options."""

    reads = ("src/spectralmoe/cli/**/*.py",)

    def lines(self) -> list[str]:
        """A section a verb: its help, then its options."""
        return command_lines()


def command_lines() -> list[str]:
    """Markdown that says what every verb does, with its options and their defaults."""
    root = typer.main.get_command(application)
    return [line for name, verb in root.commands.items() for line in _verb(f"spectralmoe {name}", verb)]  # type: ignore[attr-defined]


def _verb(name: str, command: Any) -> list[str]:
    """The section of a verb, or the sections of a group's verbs."""
    if getattr(command, "commands", None):
        return [line for job, part in command.commands.items() for line in _verb(f"{name} {job}", part)]
    words = [_word(param) + ("..." if param.nargs < 0 else "") for param in command.params if not _option(param)]
    table = ["| option | what it does | default |", "| --- | --- | --- |"]
    for param in command.params:
        if _option(param) and not param.hidden:
            table.append(f"| `{', '.join(param.opts)}` | {_cell(param.help)} | {_default(param)} |")
        elif getattr(param, "help", None):
            table.append(f"| `{_word(param)}` | {_cell(param.help)} |  |")
    text = [_example(line.strip()) or _prose(line.strip()) for line in (command.help or "").split("\n")]
    return ["", f"## {name}", "", f"`{' '.join([name, *words, '[OPTION]...'])}`", "", *text, "", *table, ""]


def _example(line: str) -> str | None:
    """A line of the help that shows a command, as a block of code."""
    return f"```sh\n{line.removeprefix('Example: ')}\n```" if line.startswith("Example: ") else None


def _option(param: Any) -> bool:
    return bool(param.param_type_name == "option")


def _word(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def _default(param: Any) -> str:
    """What holds where the option is not given: as ``--help`` shows it; of one that must be given, that word."""
    if param.required:
        return "must be given"
    value = param.show_default if isinstance(param.show_default, str) else param.default
    return "" if value is None or value is False else f"`{value}`"


def _cell(text: str | None) -> str:
    return _prose(" ".join((text or "").split())).replace("|", "\\|")


def _prose(text: str) -> str:
    """Plain text of the help as Markdown: options are code, nothing else in it is markup."""
    for mark in "\\`*_<[":
        text = text.replace(mark, f"\\{mark}")
    return re.sub(r"(?<![\w-])--[a-z][a-z-]*", r"`\g<0>`", text)


def setup(app: Sphinx) -> ExtensionMetadata:
    """The four directives."""
    for name, directive in {"field": Field, "claims": Claims, "commands": Commands, "versions": Versions}.items():
        app.add_directive(name, directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
