"""YAML recipe to typed settings, with `key=value` overrides; unknown keys are errors.

Each consumer declares its own settings beside itself, as a subclass of `Settings`; this module only
knows how to read and write them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
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
            each fault is named with its key.
    """
    values = _read_mapping(path)
    for override in overrides:
        apply_override(values, override)
    return validated(values, kind, str(path))


def validated(values: object, kind: type[AnySettings], origin: str) -> AnySettings:
    """Settings of a kind from plain values; `origin` is named in errors."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{origin}: {_faults(error)}") from None


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


def _faults(error: ValidationError) -> str:
    faults = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"]) or "recipe"
        if fault["type"] == "extra_forbidden":
            faults.append(f"unknown key {key!r}")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            received = fault["input"]
            # of a mapping the key says enough
            is_plain = received is None or isinstance(received, str | int | float | list)
            faults.append(f"{key}: {message}{f', not {received!r}' if is_plain else ''}")
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
