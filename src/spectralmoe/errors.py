"""The one kind of error that a user of the library or the command line is meant to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import ClassVar

__all__ = ["UserError", "first_line", "one_of", "refuse_differences"]

_LISTED = 5


class UserError(ValueError):
    """A mistake that the caller can mend: one line with the wrong word, the cause and the cure.

    The command line prints it without a traceback and ends with its ``exit_code``: 2, a mistake of the user's; 1 for
    what went wrong while it ran.
    """

    exit_code: ClassVar[int] = 2


def one_of(kind: str, name: str, known: object) -> UserError:
    """The error for an unknown ``name``: says what kind of thing it is, which known one is near, and lists them all.

    >>> print(one_of("router", "liner", ["cosine", "linear"]))
    unknown router 'liner'; did you mean 'linear'? known: cosine, linear
    >>> print(one_of("router", "hash", ["cosine", "linear"]))
    unknown router 'hash'; known: cosine, linear
    """
    names = sorted(map(str, known))  # type: ignore[call-overload]
    lowered = {each.lower(): each for each in names}
    near = [lowered[each] for each in get_close_matches(str(name).lower(), lowered, n=1)]
    guess = f"; did you mean {near[0]!r}?" if near else ";"
    return UserError(f"unknown {kind} {name!r}{guess} known: {', '.join(names)}")


def first_line(error: Exception) -> str:
    """What another library's error says in its first line, without the full stop; its kind where it says nothing.

    A first line that ends with a colon is joined with the second.

    >>> first_line(KeyError()), first_line(OSError("no disk.\\nDetails")), first_line(ValueError("wrong:\\n  width 3"))
    ('KeyError', 'no disk', 'wrong: width 3')
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".:")


def refuse_differences(start: str, wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> None:
    """Raise unless two sets of tensors, name -> shape, are the same.

    Raises:
        UserError: ``start``, and what is missing, extra or of another shape.

    >>> refuse_differences("a.pt does not fit", {"w": (2, 3), "b": (2,)}, {"w": (2, 4)})
    Traceback (most recent call last):
    spectralmoe.errors.UserError: a.pt does not fit: 'w' has shape [2, 4], the model wants [2, 3]; missing 'b'
    """
    problems = [f"missing {name!r}" for name in wanted.keys() - found.keys()]
    problems += [f"extra {name!r}" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name!r} has shape {list(found[name])}, the model wants {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise UserError(f"{start}: {'; '.join(sorted(problems)[:_LISTED])}{more}")
