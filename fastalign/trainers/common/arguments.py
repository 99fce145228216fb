"""From `--config x.yaml --key value` to a typed dataclass, and a `--help` that a person can read.

A command's configuration is one dataclass; its fields are the keys. The command line wins over the YAML file. Values
are converted by the field's type, so that `learning_rate: 1e-5`, which YAML reads as text, is the number it looks like.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .other_names import in_python, near, translate

C = TypeVar("C")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_OTHER = "Also accepted"
_ORDER = ("Model and data", "Run", "Loss", "Reference", "LoRA")


class Helped(Exception):
    """Raised by `parse` when help was asked for; carries the text to print."""


def key(default: Any, help: str, *, group: str = "Run", bare: bool = False) -> Any:
    """A configuration field: its default, one line of help, and the heading it stands under in `--help`.

    bare: `--key` alone is as good as `--key true`, though the type is not bool.
    """
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "bare": bare})


class _Named(type):
    """Makes a configuration of keyword arguments under any name that the command line knows of a key."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        ours = {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        return super().__call__(*args, **in_python(cls.__name__, given, ours))

    @property
    def __signature__(cls) -> inspect.Signature:
        """That of the keys, for help and editors."""
        whole = inspect.signature(cls.__init__)  # type: ignore[misc]
        return whole.replace(parameters=list(whole.parameters.values())[1:])


class Keys(metaclass=_Named):
    """Base of the configurations: TypeError for a keyword argument that is no key, with what to use instead."""


def parse(
    config: type[C], argv: Sequence[str], *, command: str, needs: Sequence[str] = (), common: Sequence[str] = ()
) -> C:
    """Builds `config` from a command line: `--config FILE.yaml`, `--key value`, `--key=value`, `--flag` (true).

    Args:
        config: a dataclass, its own fields made with `key`.
        argv: the arguments after the command's name.
        command: the command's name, for messages.
        needs: keys that must be given.
        common: inherited fields that the help shows in full; other inherited ones are only named.

    Raises:
        ValueError: an unknown key (with the nearest known ones), a value of the wrong type, a missing required key.
        Helped: `--help` was among the arguments.
    """
    if any(a in ("-h", "--help") for a in argv):
        raise Helped(help_text(config, command, needs, common))
    types_by_name = typing.get_type_hints(config)
    fields = {f.name: f for f in dataclasses.fields(config) if f.init}  # type: ignore[arg-type]
    values, bare = given_keys(argv, fields, command)
    for name in bare:
        if not (bool in _members(types_by_name[name]) or fields[name].metadata.get("bare")):
            raise ValueError(f"--{name} needs a value: --{name} VALUE")
    missing = [name for name in needs if values.get(name) in (None, "")]
    if missing:
        raise ValueError(f"{command} needs {', '.join('--' + n for n in missing)} (see fastalign {command} --help)")
    return config(**{name: convert(name, types_by_name[name], value) for name, value in values.items()})


def given_keys(argv: Sequence[str], known: Collection[str], command: str) -> tuple[dict[str, Any], list[str]]:
    """(values by key of the command line and its YAML file, keys without a value, which are taken as true).

    Keys of other libraries that mean one of ours are that one.

    Raises:
        ValueError: a key that is none (with the nearest known ones, or what to use instead), or one that is given twice
            under two names.
    """
    given, path, bare = _split(argv, command)
    values: dict[str, Any] = {}
    for part in (_read_yaml(path) if path else {}, given):
        named: dict[str, str] = {}
        for name, value in part.items():
            own = translate(name, known)
            if own not in known:
                raise ValueError(_unknown(name, known, command))
            if own in named:
                raise ValueError(f"--{named[own]} and --{name} are one key; give it once")
            named[own], values[own] = name, value
    return values, [translate(name, known) for name in bare]


def _split(argv: Sequence[str], command: str) -> tuple[dict[str, Any], str | None, list[str]]:
    """(values by key, path of the YAML file, keys without a value, which are taken as true)."""
    given: dict[str, Any] = {}
    bare = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise ValueError(f"expected --key value; got {word!r} (see fastalign {command} --help)")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not equals:
            value = "true"
            bare.append(name)
        given[name] = value
    if "config" in bare:
        raise ValueError("--config needs a value: --config FILE.yaml")
    return given, given.pop("config", None), bare


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"--config must be a YAML file; there is no {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config must be a YAML file; {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold keys and values; got a {type(values).__name__}")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _unknown(name: str, fields: Iterable[str], command: str) -> str:
    like = near(name, fields)
    hint = f"did you mean {' or '.join('--' + n for n in like)}?" if like else f"see fastalign {command} --help"
    return f"unknown key --{name}; {hint}"


# ------------------------------------------------------------------------------------------------------- conversion
def _to_bool(value: Any) -> bool:
    text = str(value).lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError
    number = float(value)
    if number != int(number):
        raise ValueError
    return int(value) if isinstance(value, (int, str)) and str(value).lstrip("+-").isdigit() else int(number)


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _to_str(value: Any) -> str:
    if isinstance(value, (dict, list)):
        raise ValueError
    return str(value).lower() if isinstance(value, bool) else str(value)


def _to_dict(value: Any) -> dict:
    parsed = json.loads(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise ValueError
    return parsed


def _to_list(value: Any) -> list:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise ValueError
    return list(value)


_SIMPLE: dict[Any, tuple[str, Callable[[Any], Any]]] = {
    bool: ("true or false", _to_bool),
    int: ("a whole number", _to_int),
    float: ("a number", _to_float),
    str: ("text", _to_str),
    dict: ("a mapping", _to_dict),
    list: ("a list", _to_list),
}


def _members(kind: Any) -> list[Any]:
    """The alternatives of a Union (None last), or the type alone. Mappings are tried first: text would swallow them."""
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return [kind]
    order: dict[Any, int] = {dict: 0, bool: 1, int: 2, float: 3, list: 5, str: 4, type(None): 6}
    found = sorted(typing.get_args(kind), key=lambda k: order.get(typing.get_origin(k) or k, 3))
    # Transformers writes `SchedulerType | str`, and takes of the texts only those that the enumeration has.
    return [k for k in found if k is not str] if any(map(_is_enum, found)) else found


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def _name(kind: Any) -> str:
    base = typing.get_origin(kind) or kind
    if base is typing.Literal:
        return " or ".join(map(str, typing.get_args(kind)))
    if _is_enum(base):
        names = [str(m.value) for m in base]
        return " | ".join(names[:6] + ["..."] * (len(names) > 6))
    return (
        "null" if base is type(None) else _SIMPLE[base][0] if base in _SIMPLE else getattr(base, "__name__", str(base))
    )


def _try(kind: Any, value: Any) -> Any:
    """The value as this one type; ValueError or TypeError where it cannot be."""
    base = typing.get_origin(kind) or kind
    if base is type(None):
        if value is None or (isinstance(value, str) and value.lower() == "null"):
            return None
        raise ValueError
    if value is None:
        raise ValueError
    if base is typing.Literal:
        for choice in typing.get_args(kind):
            if str(choice).lower() == str(value).lower():
                return choice
        raise ValueError
    if _is_enum(base):
        return value if isinstance(value, base) else base(value)
    if base is dict and typing.get_args(kind):
        _, each = typing.get_args(kind)
        return {str(name): _try(each, entry) for name, entry in _to_dict(value).items()}
    if base in _SIMPLE:
        return _SIMPLE[base][1](value)
    return value


def convert(name: str, kind: Any, value: Any) -> Any:
    """`value` (text from the command line, or what YAML made of it) as the field's type; ValueError naming the key."""
    members = _members(kind)
    if isinstance(value, str) and value.lower() == "null":
        members = members[::-1]
    for member in members:
        try:
            return _try(member, value)
        except (ValueError, TypeError):
            continue
    raise ValueError(f"--{name} must be {' or '.join(_name(m) for m in members)}; got {value!r}")


# ------------------------------------------------------------------------------------------------------------- help
def help_text(config: type, command: str, needs: Sequence[str] = (), common: Sequence[str] = ()) -> str:
    """The help of a command: its purpose, its keys by group with defaults, and the names of the inherited keys."""
    groups: dict[str, list[str]] = {}
    others = []
    hints = typing.get_type_hints(config)
    for f in dataclasses.fields(config):
        if "group" in f.metadata:
            groups.setdefault(f.metadata["group"], []).append(_entry(f, hints[f.name], f.name in needs))
        elif f.name in common:
            groups.setdefault("Training loop", []).append(_entry(f, hints[f.name], f.name in needs))
        elif f.init and not f.name.startswith("_"):
            others.append(f.name)
    parts = [f"usage: fastalign {command} [--config FILE.yaml] [--key value ...]", (config.__doc__ or "").strip()]
    order = sorted(groups, key=lambda title: (_ORDER.index(title) if title in _ORDER else len(_ORDER), title))
    parts += [f"{title}:\n" + "\n".join(groups[title]) for title in order]
    if others:
        names = textwrap.fill(", ".join(others), 110, initial_indent="  ", subsequent_indent="  ")
        parts.append(f"{_OTHER} (as in transformers.TrainingArguments):\n{names}")
    return "\n\n".join(parts)


def _entry(f: dataclasses.Field, kind: Any, required: bool) -> str:
    kinds = " or ".join(_name(m) for m in _members(kind))
    default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
    state = "required" if required else f"default: {_shown(default)}"
    first = " ".join(str(f.metadata.get("help", "")).split()).split(". ")[0].rstrip(".")
    text = textwrap.fill(f"{first} [{kinds}; {state}]", 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  --{f.name}\n{text}"


def _shown(value: Any) -> Any:
    """A default as one would write it in YAML."""
    if isinstance(value, enum.Enum):
        return value.value
    return json.dumps(value) if value is None or isinstance(value, (bool, dict, list)) else value
