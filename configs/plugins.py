"""Encoders, data sets and heads from outside this package, which a config names like those inside it.

An installed package offers one as an entry point; a script or a notebook registers one by a call. Entry points are
looked up by name, so a package is imported only if a config names what it offers.
"""

import difflib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from egopatch.configs.schema import ConfigError

T = TypeVar("T")
EGOPATCH, CALL = "egopatch", "an earlier call"


def of_this_package(value: object) -> bool:
    """Whether the class of `value` is defined in this package."""
    return type(value).__module__.partition(".")[0] == EGOPATCH


def call_fault(function: object, *arguments: str) -> str | None:
    """What prevents a call of `function` with these arguments, given by their names; None if nothing does.

    Without this, the TypeError of such a call would have a traceback that shows none of the function's lines.
    """
    expected = f"expected a function of ({', '.join(arguments)})"
    if not callable(function):
        return f"is of type {type(function).__name__}; {expected}"
    try:
        signature = inspect.signature(function)
    except ValueError:  # it is not written in Python
        return None
    try:
        signature.bind(*arguments)
    except TypeError:
        return f"takes {signature}; {expected}"
    return None


@contextmanager
def traceback_kept(whose: str) -> Iterator[None]:
    """Turn an error of code from outside this package into one that commands print with its traceback.

    A command prints a ValueError or an OSError as one line, since those of this package say all that a user needs. An
    error in outside code is found only by its traceback. A `sys.exit` in it would end the command without an error, and
    with an exit code that means something else: 0 would call the work done. Errors of this package's own classes, such
    as `ConfigError`, with which that code refuses its input, are left unchanged.

    Args:
        whose: Whose code the block calls, such as `the head mine`.

    Raises:
        RuntimeError: Replaces any other ValueError or OSError, or a SystemExit, which becomes its cause. A
            BrokenPipeError is left unchanged too: nobody reads the output any more.
    """
    try:
        yield
    except (ValueError, OSError, SystemExit) as error:
        if isinstance(error, BrokenPipeError) or of_this_package(error):
            raise
        raise RuntimeError(f"{whose} raises {type(error).__name__}: {error}") from error


class Plugins(Generic[T]):
    """Values from outside this package that one option may name.

    Args:
        option: The option, such as `encoder.arch`.
        group: Group of the entry points, such as `egopatch.encoders`.
        taken: Names that this package has.
        fault: Returns what is wrong with an object to be registered under a name; None if nothing is.
    """

    def __init__(
        self, option: str, group: str, taken: Collection[str], fault: Callable[[str, object], str | None]
    ) -> None:
        self.option, self.group = option, group
        self._taken, self._fault = taken, fault
        self._registered: dict[str, T] = {}

    def register(self, name: str, plugin: T, replace: bool = False) -> None:
        """Let `option` name `plugin` in this process and in the workers that it starts.

        Args:
            name: Value of the option.
            plugin: The object that it selects.
            replace: Whether to replace what an earlier call registered, as when a notebook's cell runs again.

        Raises:
            ConfigError: The name is taken or no text, or `plugin` is of the wrong kind.
        """
        if not (isinstance(name, str) and name):
            hint = f": the arguments are swapped, give {plugin!r:.60} first" if isinstance(plugin, str) else ""
            raise ConfigError(
                f"the name to register as {self.option} is {name!r:.60}; expected text, such as 'mine'{hint}"
            )
        if owners := self._owners(name, called=not replace):
            again = ", or pass replace=True" if owners == [CALL] else ""
            raise ConfigError(f"{self.option} {name!r} is already registered by {owners[0]}; use another name{again}")
        if fault := self._fault(name, plugin):
            raise ConfigError(f"{self.option} {name!r} cannot be registered: it {fault}")
        self._registered[name] = plugin

    def find(self, name: str) -> T | None:
        """The plugin that `name` selects; None if `name` belongs to this package.

        Raises:
            ConfigError: The name is unknown, or several packages offer it; or the package that offers it cannot be
                imported, or offers something else. The message names the package.
        """
        owners = self._owners(name)
        if len(owners) > 1:
            raise ConfigError(
                f"{self.option} {name!r} is registered by {' and by '.join(owners)}; uninstall one of them, or "
                "register another name"
            )
        if name in self._taken:
            return None
        if name in self._registered:
            return self._registered[name]
        if owners:
            return self._load(self._points(name)[0])
        names = sorted(
            {*self._taken, *self._registered, *(point.name for point in _offered(self.group, tuple(sys.path)))}
        )
        close = difflib.get_close_matches(name, names, n=1)
        # Names that a script registers exist only in its own process.
        scripts = (
            "if a script registers it, start the command from that script; a package offers it as an entry point in "
            f"the group {self.group}"
        )
        hint = f"did you mean {close[0]}?" if close else f"{scripts} (docs/extending.md)"
        raise ConfigError(f"{self.option} is {name!r}; expected one of {', '.join(names)}; {hint}")

    def package_of(self, name: str) -> str | None:
        """Name and version of the package that offers `name`; None if none does."""
        return next((_named(point) for point in self._points(name)), None)

    def _owners(self, name: str, called: bool = True) -> list[str]:
        """Who has registered `name`; calls are left out unless `called`."""
        here = [EGOPATCH] if name in self._taken else [CALL] if called and name in self._registered else []
        return here + [_named(point) for point in self._points(name)]

    def _points(self, name: str) -> list[EntryPoint]:
        # A package that is installed twice, such as editable and in a folder on PYTHONPATH, offers the same twice.
        offered = _offered(self.group, tuple(sys.path))
        return list({(point.value, _named(point)): point for point in offered if point.name == name}.values())

    def _load(self, point: EntryPoint) -> T:
        try:
            plugin = point.load()
        except (Exception, SystemExit) as error:  # whatever the package's own code raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ConfigError(
                f"{self.option} is {point.name!r}, but the package {_named(point)} that registers it cannot be "
                f"imported ({reason}); repair or uninstall the package"
            ) from error
        if fault := self._fault(point.name, plugin):
            raise ConfigError(
                f"{self.option} is {point.name!r}, but {point.value} in the package {_named(point)} {fault}"
            )
        return plugin


@cache
def _offered(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """The entry points of a group in the packages on `path`; cached, since reading them takes 10 ms."""
    return tuple(entry_points(group=group))


def _named(point: EntryPoint) -> str:
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
