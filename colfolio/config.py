"""YAML recipe to typed settings, with `key=value` overrides; unknown keys are errors.

Each consumer declares its own settings beside itself, as a subclass of `Settings`; this module only
knows how to read and write them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from colfolio.errors import RecipeError


class Settings(BaseModel):
    """Base of all settings: frozen, typed, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


AnySettings = TypeVar("AnySettings", bound=Settings)


def load_settings(
    path: Path, kind: type[AnySettings], overrides: Sequence[str] = ()
) -> AnySettings:
    """Read a YAML file as settings of a kind.

    Args:
        path: the YAML file; relative paths inside it mean what they say to their consumer.
        kind: a subclass of `Settings`.
        overrides: `key=value`, with dots for nesting (`optimiser.lr=3e-4`), values as YAML.

    Raises:
        RecipeError: the file is missing or no YAML mapping, a key is unknown, a value does not fit;
            each fault is named with its line and key.
    """
    values = _read_mapping(path)
    for override in overrides:
        apply_override(values, override)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError(_faults(error, lambda key: _place(path, key, overrides))) from None


def validated(values: object, kind: type[AnySettings], origin: str) -> AnySettings:
    """Settings of a kind from plain values; `origin` is named in errors."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = _faults(error, lambda _: "")
        raise RecipeError(f"{origin}: {faults}") from None


@contextmanager
def naming_lines(path: Path, inside: str, overrides: Sequence[str] = ()) -> Iterator[None]:
    """A context in which errors that name a key of settings get the line of the recipe.

    Args:
        path: the recipe.
        inside: the key of the recipe under which those settings are.
        overrides: as of `load_settings`; what they set is in no line.
    """
    try:
        yield
    except RecipeError as error:
        if not error.key:
            raise
        place = _place(path, f"{inside}.{error.key}", overrides)
        raise RecipeError(f"{place}{inside}.{error}") from None


def line_of(text: str, key: str) -> int | None:
    """The line of a key in YAML, counted from 1; of the deepest that is there of `a.0.b`.

    >>> line_of("train:\\n  thaw:\\n  - open: [norm]\\n    lr: 1", "train.thaw.0.lr.x")
    4
    """
    node, line = yaml.compose(text, Loader=_RecipeLoader), None
    for name in key.split("."):
        inside: list[tuple[str, yaml.Node, yaml.Node]] = []
        if isinstance(node, yaml.MappingNode):
            inside = [(str(name.value), name, value) for name, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            inside = [(str(number), value, value) for number, value in enumerate(node.value)]
        found = next((each for each in inside if each[0] == name), None)
        if found is None:
            break
        line, node = found[1].start_mark.line + 1, found[2]
    return line


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key=value` in nested plain values, in place; dots in the key go down a level."""
    name, sign, text = override.partition("=")
    if not sign or not name:
        raise RecipeError(f"override {override!r}: expected key=value, as in optimiser.lr=3e-4")
    *parents, leaf = name.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise RecipeError(f"override {override!r}: {parent!r} holds a value, not settings")
    try:
        values[leaf] = yaml.load(text, Loader=_RecipeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: is not valid YAML: {error}") from None


def to_yaml(settings: Settings) -> str:
    """The settings as YAML that `load_settings` reads back to equal settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    return values


def _place(path: Path, key: str, overrides: Sequence[str]) -> str:
    """What an error about a key begins with: the file, and its line if the key stands there."""
    given = [override.partition("=")[0] for override in overrides]
    if any(f"{key}.".startswith(f"{each}.") for each in given):
        return f"{path}: "
    line = line_of(path.read_text(encoding="utf-8"), key)
    return f"{path}: " if line is None else f"{path}:{line}: "


def _faults(error: ValidationError, place: Callable[[str], str]) -> str:
    """All faults in one line, each behind its place."""
    faults = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            faults.append(f"{place(key)}unknown key {key!r}")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            received = fault["input"]
            # of a mapping the key says enough
            is_plain = received is None or isinstance(received, str | int | float | list)
            told = f"{message}{f', not {received!r}' if is_plain else ''}"
            faults.append(f"{place(key)}{key or 'recipe'}: {told}")
    return "; ".join(faults)


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 reads `3e-4` as a string, and the last of two equal keys; a recipe means neither."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"key {key.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_RecipeLoader.yaml_implicit_resolvers = {
    first: list(resolvers) for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
