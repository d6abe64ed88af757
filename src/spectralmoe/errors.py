"""The one kind of error that a user of the library or the command line is meant to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["UserError", "first_line", "one_of", "refuse_differences"]

_LISTED = 5


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
