"""YAML recipe to typed settings, with `key=value` overrides; unknown keys are errors.

Each consumer declares its own settings beside itself, as a subclass of `Settings`; this module only
knows how to read and write them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import ErrorDetails

from colfolio.errors import RecipeError

# what pydantic says, in words of YAML
_WORDS = (
    (re.compile(r"a valid dictionary or instance of \w+"), "a mapping of keys to values"),
    (re.compile("a valid tuple"), "a list"),
    (re.compile("^Tuple"), "List"),
)
_BRACKETS = re.compile(r"\w+\[[^\[\]\n]*\]")


class Settings(BaseModel):
    """Base of all settings: frozen, typed, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth(cls, value: object, about: Any) -> object:
        """Python takes `true` for the number 1; a recipe and a file do not mean that."""
        kind = cls.model_fields[about.field_name or ""].annotation
        if _has_truth(value) and not _admits_truth(kind):
            raise ValueError(f"received {value!r}, and takes neither true nor false")
        return value


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
        faults = _faults(error, kind, values, lambda key: _place(path, key, overrides))
        raise RecipeError(faults) from None


def validated(values: object, kind: type[AnySettings], origin: str) -> AnySettings:
    """Settings of a kind from plain values; `origin` is named in errors."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        faults = _faults(error, kind, values, lambda _: "")
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
        raise RecipeError(f"override {override!r}: {_yaml_fault(error)[1]}") from None


def to_yaml(settings: Settings) -> str:
    """The settings as YAML that `load_settings` reads back to equal settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_RecipeLoader)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line, told = _yaml_fault(error)
        raise RecipeError(f"{path}:{line}: {told}" if line else f"{path}: {told}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    return values


def _place(path: Path, key: str, overrides: Sequence[str]) -> str:
    """What an error about a key begins with: the file, and its line if the key stands there."""
    given = [override.partition("=")[0] for override in overrides]
    if any(f"{key}.".startswith(f"{each}.") for each in given):
        return f"{path}: "
    text = path.read_text(encoding="utf-8")
    if any(each.startswith(f"{key}.") for each in given) and not _holds(text, key):
        return f"{path}: "  # an override has made the key
    line = line_of(text, key)
    return f"{path}: " if line is None else f"{path}:{line}: "


def _holds(text: str, key: str) -> bool:
    """Whether a key stands in YAML."""
    values = yaml.load(text, Loader=_RecipeLoader)
    for name in key.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return False
        values = values[name]
    return True


def _yaml_fault(error: yaml.YAMLError | UnicodeDecodeError) -> tuple[int, str]:
    """The line that a reader of YAML stopped at, 0 if unknown, and what is wrong with it."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    if mark is None:
        return 0, f"is not valid YAML: {error}"
    for found in _BRACKETS.finditer(mark.buffer or ""):
        if found.start() <= mark.pointer < found.end():
            told = f'in a list between brackets it stands in quotes, "{found[0]}"'
            return mark.line + 1, f"{found[0]} has brackets; {told}"
    return mark.line + 1, f"is not valid YAML: {error}"


def _faults(
    error: ValidationError, kind: type[Settings], values: object, place: Callable[[str], str]
) -> str:
    """All faults in one line, each behind its place.

    Args:
        kind: of settings that were expected.
        values: what was received.
    """
    by_key: dict[str, list[ErrorDetails]] = {}
    for fault in error.errors():
        by_key.setdefault(_key_of(fault["loc"], values), []).append(fault)
    return "; ".join(
        f"{place(key)}{_told_of_key(key, faults, kind)}"
        for key, faults in by_key.items()
        if not _is_echo(key, faults, by_key)
    )


def _key_of(location: tuple[str | int, ...], values: object) -> str:
    """A fault's key as a recipe has it: pydantic also names the kinds that a value may be of."""
    names: list[str] = []
    for name in location:
        if not isinstance(values, Mapping | list | tuple):
            break
        names.append(str(name))
        if isinstance(values, Mapping):
            values = values.get(name)
        else:
            values = values[name] if isinstance(name, int) and name < len(values) else None
    return ".".join(names)


def _is_echo(key: str, faults: Sequence[ErrorDetails], by_key: Mapping[str, object]) -> bool:
    """Whether a list is too short only because something in it is wrong."""
    is_short = all(fault["type"] == "too_short" for fault in faults)
    return is_short and any(other.startswith(f"{key}.") for other in by_key)


def _told_of_key(key: str, faults: Sequence[ErrorDetails], settings: type[Settings]) -> str:
    """What is wrong with the value of a key; of several kinds that it is not, all."""
    if faults[0]["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_meant(key, _known_keys(settings, faults[0]['loc'][:-1]))}"
    message = ", or ".join(_in_words(fault["msg"]) for fault in faults)
    received = faults[0]["input"]
    # of a mapping the key says enough; of a length the message does, as those of ours mostly do
    kind = faults[0]["type"]
    is_ours = kind == "value_error" and repr(received) in message
    is_said = is_ours or kind in ("missing", "too_short", "too_long")
    is_plain = received is None or isinstance(received, str | int | float | list)
    ending = f", not {received!r}" if is_plain and not is_said else ""
    return f"{key or 'recipe'}: {message}{ending}"


def _known_keys(kind: Any, location: Sequence[str | int]) -> set[str]:
    """The keys of the settings at a location, which names kinds of a union as well."""
    kinds = _settings_in(kind)
    for name in location:
        inner = [each.model_fields[name].annotation for each in kinds if name in each.model_fields]
        if inner:
            kinds = [each for annotation in inner for each in _settings_in(annotation)]
    return {name for each in kinds for name in each.model_fields}


def _settings_in(kind: Any) -> list[type[BaseModel]]:
    """The classes of settings that a type is made of."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind]
    return [each for part in get_args(kind) for each in _settings_in(part)]


def _meant(key: str, known: set[str]) -> str:
    """Which key may be meant, or all that there are."""
    name = key.rpartition(".")[2]
    like = get_close_matches(name, known, n=1)
    if like:
        return f" (did you mean {like[0]!r}?)"
    return f" (known are {', '.join(sorted(known))})" if known else ""


def _in_words(message: str) -> str:
    message = message.removeprefix("Value error, ")
    for pattern, words in _WORDS:
        message = pattern.sub(words, message)
    return message


def _has_truth(value: object) -> bool:
    """Whether there is true or false in a value, not counting what other settings check."""
    if isinstance(value, Mapping):
        return any(map(_has_truth, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_truth, value))
    return isinstance(value, bool)


def _admits_truth(kind: Any) -> bool:
    """Whether a field may hold true or false, or settings that check that for themselves."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return True
    return kind in (bool, Any) or any(map(_admits_truth, get_args(kind)))


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
