"""UserError: the error that users of the library and of the command line are meant to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import ClassVar

__all__ = ["UserError", "check_whole", "first_line", "one_of", "refuse_differences"]

_LISTED = 5


class UserError(ValueError):
    """A mistake that the caller can mend; the message is one line with the wrong word, the cause and the cure.

    The command line prints it without a traceback and ends with its ``exit_code``: 2 for a mistake of the user, 1 for a
    failure while it ran.
    """

    exit_code: ClassVar[int] = 2


def one_of(kind: str, name: str, known: object) -> UserError:
    """Return the error for an unknown ``name`` of some ``kind``; it suggests a similar name and lists all known ones.

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


def check_whole(who: str, name: str, value: object, least: int = 1, *, cure: str = "") -> None:
    """Raise an error unless ``value`` is an int of at least ``least``; its last words are ``cure``.

    Raises:
        UserError: it is smaller, or of another type: a number of NumPy could not be saved as JSON.

    >>> check_whole("TopK", "k", 2.0)
    Traceback (most recent call last):
    spectralmoe.errors.UserError: TopK: k must be at least 1 and a Python int, got float 2.0
    """
    if not isinstance(value, int):
        kind = type(value).__name__
        raise UserError(f"{who}: {name} must be at least {least} and a Python int, got {kind} {value}{cure}")
    if value < least:
        raise UserError(f"{who}: {name} must be at least {least}, got {value}{cure}")


def first_line(error: Exception) -> str:
    """Return the first line of another library's error, without the full stop; its class name if it has no message.

    If the first line ends with a colon, the second is joined to it.

    >>> first_line(KeyError()), first_line(OSError("no disk.\\nDetails")), first_line(ValueError("wrong:\\n  width 3"))
    ('KeyError', 'no disk', 'wrong: width 3')
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".:")


def refuse_differences(start: str, wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> None:
    """Raise an error unless two sets of tensors, given as name -> shape, are the same.

    Raises:
        UserError: they differ; the message is ``start`` and what is missing, extra or of another shape.

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
