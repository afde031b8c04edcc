"""A configuration that is being translated: what was read of it, and the recipe so far."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from eaftdrope.errors import UserError, raise_problems

from ..suggest import did_you_mean
from .leftovers import Leftovers

OFF = (None, False, "", "none", "None", "no", "false", [], {})
"""Values that switch an option off, so that nothing is lost by leaving it out."""


class Fate(enum.Enum):
    """What became of a key of the configuration."""

    WRITTEN = "written"
    NOTHING = "nothing to write"
    LOST = "not translated"


@dataclass(frozen=True)
class KeyFate:
    """One key of the configuration: `note` is the key of the recipe, or the reason."""

    key: str
    value: Any
    fate: Fate
    note: str


@dataclass
class Translation:
    """A recipe as plain data, with what became of every key.

    Attributes:
        tool: name of the tool.
        recipe: the recipe; sections in the order of the schema.
        origins: key of the recipe (`train.learning_rate`) -> what it was written for.
        fates: one per key of the configuration, in its order.
    """

    tool: str
    recipe: dict[str, Any]
    origins: dict[str, str]
    fates: list[KeyFate]


@dataclass
class Draft:
    """A configuration with a record of what was read of it, and the recipe so far.

    Every method that decides on a key records it, and `finish` decides on all others.
    """

    tool: str
    config: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    _fates: dict[str, KeyFate] = field(default_factory=dict)
    _read: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of the configuration; `default` if it is missing or null."""
        self._read.add(key)
        value = self.config.get(key)
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> Any:
        """Return a value as a number (YAML 1.1 readers take `1e-5` for text, so people quote it); None if missing.

        Raises:
            UserError: it is something else.
        """
        value = self.get(key, default)
        try:
            if isinstance(value, str):
                return int(value) if value.strip().lstrip("+-").isdigit() else float(value)
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                return value
        except ValueError:
            pass
        raise UserError(f"{key}: expected a number, found {value!r}.")

    def write(self, path: str, value: Any, *keys: str, default: bool = False) -> None:
        """Write a key of the recipe.

        Args:
            path: its sections and name, such as `train.learning_rate`.
            keys: the keys of the configuration that it stands for.
            default: the value is the tool's own default, which differs from that of a recipe.
        """
        *sections, name = path.split(".")
        here = self.recipe
        for section in sections:
            here = here.setdefault(section, {})
        here[name] = value
        present = [key for key in keys if key in self.config]
        for key in present:
            self._decide(key, Fate.WRITTEN, path)
        self.origins[path] = ", ".join(present) or (f"the default of {self.tool}" if default else "")

    def number_to(self, key: str, path: str, default: float | None, kind: type) -> None:
        """Translate a number: `kind` is int or float; nothing is written without a value and a default."""
        value = self.number(key, default)
        if value is not None:
            self.write(path, kind(value), key, default=True)

    def nothing(self, why: str, *keys: str) -> None:
        """Record that nothing has to be written for keys."""
        for key in keys:
            if key in self.config:
                self._decide(key, Fate.NOTHING, why)

    def lose(self, why: str, *keys: str) -> None:
        """Record that keys cannot be translated; those that are switched off need nothing."""
        for key in keys:
            if key in self.config:
                off = self.config[key] in OFF
                self._decide(key, Fate.NOTHING if off else Fate.LOST, "off" if off else why)

    def refuse(self, why: str) -> None:
        """Record that the configuration as a whole cannot become a recipe."""
        self.refusals.append(why)

    def record(self, key: str, value: Any, fate: Fate, note: str) -> None:
        """Record what became of a nested key, such as `datasets[0].type`."""
        self._fates[key] = KeyFate(key, value, fate, note)

    def _decide(self, key: str, fate: Fate, note: str) -> None:
        if key in self._fates and fate is Fate.WRITTEN and self._fates[key].fate is Fate.WRITTEN:
            note = f"{self._fates[key].note}, {note}"
        self._fates[key] = KeyFate(key, self.config[key], fate, note)

    def finish(self, leftovers: Leftovers, order: tuple[str, ...]) -> Translation:
        """Decide on every key that is left.

        Args:
            leftovers: the other keys of the tool.
            order: sections in the order of the recipe.

        Raises:
            UserError: the configuration was refused.
        """
        raise_problems(self.refusals)
        for key, value in self.config.items():
            if key in self._fates:
                continue
            found = leftovers.reason(key)
            if found is None and key in self._read:
                off = value in OFF
                self.record(
                    key, value, Fate.NOTHING if off else Fate.LOST, "off" if off else "no such value in a recipe"
                )
            elif found is None:
                hint = did_you_mean(key, leftovers.names)
                why = f"not an option of {self.tool} that is known here.{hint}"
                self.record(key, value, Fate.LOST, why)
            elif found.needs_nothing or value in OFF:
                self.record(key, value, Fate.NOTHING, found.why if found.needs_nothing else "off")
            else:
                self.record(key, value, Fate.LOST, found.why)
        recipe = {name: self.recipe[name] for name in order if name in self.recipe}
        place = {key: index for index, key in enumerate(self.config)}
        fates = sorted(self._fates.values(), key=lambda one: place[one.key.split("[")[0].split(".")[0]])
        return Translation(self.tool, recipe, self.origins, fates)
