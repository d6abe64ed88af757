"""The one kind of error that a user of the library or the command line is meant to read."""

from __future__ import annotations

__all__ = ["UserError", "one_of"]


class UserError(ValueError):
    """A mistake that the caller can mend: one line with the wrong word, the cause and the cure.

    The command line prints it without a traceback and ends with exit code 2.
    """


def one_of(kind: str, name: str, known: object) -> UserError:
    """The error for an unknown ``name``: says what kind of thing it is and lists the known ones.

    >>> print(one_of("router", "liner", ["cosine", "linear"]))
    unknown router 'liner'; known: cosine, linear
    """
    return UserError(f"unknown {kind} {name!r}; known: {', '.join(sorted(map(str, known)))}")  # type: ignore[call-overload]
