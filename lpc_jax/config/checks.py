"""What every settings object checks when it is made: names, types, then meaning."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, Literal

from lpc_jax.errors import UserError

# Of 64 bits, as arrays and files hold.
_LARGEST_INTEGER = 2**63 - 1
_LONGEST_SHOWN = 200


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a value must satisfy besides its type: a rule, its words, and a remedy.

    A setting carries it in its annotation, as in ``Annotated[int, Bound(...)]``; None,
    where the type allows it, is not checked.
    """

    holds: Callable[[Any], Any]
    expected: str
    remedy: str = ""


def at_least(least: int, remedy: str = "") -> Bound:
    """A bound from below, which itself is allowed."""
    return Bound(lambda x: x >= least, f"must be at least {least}", remedy)


_ABOVE_ZERO = Bound(lambda x: x > 0, "must be above 0")
PositiveInt = Annotated[int, _ABOVE_ZERO]
PositiveFloat = Annotated[float, _ABOVE_ZERO]
NonNegativeInt = Annotated[int, at_least(0)]
NonNegativeFloat = Annotated[float, at_least(0)]
Fraction = Annotated[float, Bound(lambda x: 0 <= x <= 1, "must lie in [0, 1]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A section of the config; subclasses are frozen dataclasses."""

    section: ClassVar[str] = ""
    """What stands before a setting's name: the section's own name and a dot."""

    def __init_subclass__(cls, section: str | None = None) -> None:
        cls.section = f"{cls.__name__.lower()}." if section is None else section

    def __new__(cls, **settings: Any) -> typing.Self:
        """Refuses unknown names, with the near ones.

        Raises:
            UserError: A name that is no setting of this section.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                near = " or ".join(difflib.get_close_matches(name, known))
                names = f"{cls.__name__} has: {', '.join(known)}."
                hint = f"Did you mean {near}?" if near else names
                raise UserError(f"{cls.section}{name} is no setting. {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Refuses wrong types and values.

        Raises:
            UserError: Naming the setting, what was expected, what came, the remedy.
        """
        hints = typing.get_type_hints(type(self), include_extras=True)
        for name in (field.name for field in dataclasses.fields(self)):
            value, hint = getattr(self, name), hints[name]
            words, matches = _type(hint)
            self._require(matches(value), name, f"must be {words}")
            for bound in _OF_ANY:
                holds = all(map(bound.holds, _scalars(value)))
                self._require(holds, name, bound.expected, bound.remedy)
            for bound in _bounds(hint) if value is not None else ():
                self._require(bound.holds(value), name, bound.expected, bound.remedy)
        self._check()

    def _check(self) -> None:
        """Relations between values; overridden where there are any."""

    def _require(self, holds: Any, name: str, expected: str, remedy: str = "") -> None:
        if not holds:
            value = shown(operator.attrgetter(name)(self))
            message = f"{self.section}{name} {expected}, got {value}. {remedy}"
            raise UserError(message.rstrip())


def shown(value: Any) -> str:
    """A value as Python writes it, at a readable length."""
    try:
        written = repr(value)
    except ValueError:  # a number of more digits than Python writes
        return f"{type(value).__name__} with too many digits to write"
    if len(written) <= _LONGEST_SHOWN:
        return written
    return f"{written[:_LONGEST_SHOWN]}... ({len(written):,} characters)"


def options(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type; for ``Loss`` every loss there is."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in options(part))
    return getattr(hint, "kinds", (hint,))


def _bounds(hint: Any) -> Iterator[Bound]:
    for option in options(hint):
        for mark in getattr(option, "__metadata__", ()):
            if isinstance(mark, Bound):
                yield mark


def _type(hint: Any) -> tuple[str, Callable[[Any], bool]]:
    """A setting's annotation in words, and whether a value fits it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " or ".join(map(repr, arguments)), lambda x: x in arguments
    if origin is tuple:
        words, fits = _type(arguments[0])
        return (
            f"a tuple of {words}",
            lambda x: isinstance(x, tuple) and all(map(fits, x)),
        )
    if origin is dict:
        words, fits = _type(arguments[1])
        return (
            f"a dict from str to {words}",
            lambda x: (
                isinstance(x, dict)
                and all(isinstance(key, str) for key in x)
                and all(map(fits, x.values()))
            ),
        )
    if options(hint) != (hint,):
        words, fit = zip(*map(_type, options(hint)), strict=True)
        return " or ".join(words), lambda x: any(fits(x) for fits in fit)
    if hint in (int, float):
        kinds = int if hint is int else int | float
        return hint.__name__, lambda x: isinstance(x, kinds) and not isinstance(x, bool)
    words = "None" if hint is type(None) else hint.__name__
    return words, lambda x: isinstance(x, hint)


def _scalars(value: Any) -> Iterator[Any]:
    """A value, or what tuples and dicts hold, keys included."""
    if isinstance(value, dict | tuple):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        for part in parts:
            yield from _scalars(part)
    else:
        yield value


def _is_text(value: Any) -> bool:
    """Whether a text can be written to a file, and name one."""
    if not isinstance(value, str):
        return True
    return "\0" not in value and value == value.encode(errors="ignore").decode()


_OF_ANY = (
    Bound(lambda x: not isinstance(x, float) or math.isfinite(x), "must be finite"),
    Bound(
        lambda x: not isinstance(x, int) or abs(x) <= _LARGEST_INTEGER,
        "must fit into 64 bits",
    ),
    Bound(
        _is_text,
        "must be text without NUL and half surrogates",
        "No file could be named so.",
    ),
)
