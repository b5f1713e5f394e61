"""What every settings object checks when it is made: names, types, then meaning."""

from __future__ import annotations

import dataclasses
import difflib
import math
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


class Settings:
    """A section of the config; subclasses are frozen dataclasses."""

    section: ClassVar[str] = ""
    """What stands before a setting's name: the section's own name and a dot."""

    def __init_subclass__(cls, section: str | None = None) -> None:
        cls.section = f"{cls.__name__.lower()}." if section is None else section

    def __new__(cls, **given: Any) -> typing.Self:
        """Refuses unknown names, with the near ones.

        Raises:
            UserError: A name that is no setting of this section.
        """
        known = [field.name for field in cls.fields()]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known)
                hint = (
                    f"Did you mean {' or '.join(near)}?"
                    if near
                    else f"{cls.__name__} has: {', '.join(known)}."
                )
                raise UserError(f"{cls.section}{name} is no setting. {hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Refuses wrong types and values.

        Raises:
            UserError: Naming the setting, what was expected, what came, the remedy.
        """
        hints = typing.get_type_hints(type(self), include_extras=True)
        for name in (field.name for field in self.fields()):
            value, hint = getattr(self, name), hints[name]
            self._require(
                _type_matches(value, hint), name, f"must be {_type_name(hint)}"
            )
            for limit in _OF_ANY:
                holds = all(map(limit.holds, _scalars(value)))
                self._require(holds, name, limit.expected, limit.remedy)
            for bound in _bounds(hint) if value is not None else ():
                self._require(bound.holds(value), name, bound.expected, bound.remedy)
        self._check()

    def _check(self) -> None:
        """Relations between values; overridden where there are any."""

    def _require(self, holds: Any, name: str, expected: str, remedy: str = "") -> None:
        if not holds:
            raise UserError(
                f"{self.section}{name} {expected}, got {shown(getattr(self, name))}."
                f" {remedy}".rstrip()
            )

    @classmethod
    def fields(cls) -> tuple[dataclasses.Field[Any], ...]:
        """Its settings."""
        return dataclasses.fields(cls)  # pyright: ignore[reportArgumentType] -- every subclass is a dataclass

    @classmethod
    def kinds(cls) -> tuple[type[Settings], ...]:
        """The classes that a section of this annotation takes."""
        return (cls,)


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
    is_section = isinstance(hint, type) and issubclass(hint, Settings)
    return hint.kinds() if is_section else (hint,)


def _bounds(hint: Any) -> list[Bound]:
    return [
        extra
        for option in options(hint)
        for extra in getattr(option, "__metadata__", ())
        if isinstance(extra, Bound)
    ]


def _type_matches(value: Any, hint: Any) -> bool:
    """Whether a value fits one of the annotations that settings use."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _type_matches(value, arguments[0])
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(
            _type_matches(item, arguments[0]) for item in value
        )
    if origin is dict:
        return isinstance(value, dict) and all(
            isinstance(key, str) and _type_matches(item, arguments[1])
            for key, item in value.items()
        )
    if options(hint) != (hint,):
        return any(_type_matches(value, option) for option in options(hint))
    if hint in (int, float):
        kinds = int if hint is int else int | float
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple:
        return f"a tuple of {_type_name(arguments[0])}"
    if origin is dict:
        return f"a dict from str to {_type_name(arguments[1])}"
    if options(hint) != (hint,):
        return " or ".join(map(_type_name, options(hint)))
    return "None" if hint is type(None) else hint.__name__


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
