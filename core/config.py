"""Configuration: plain dataclasses, filled from Python, TOML files and the command line.

    @dataclass
    class Config:
        data: DataConfig = opt(DataConfig, "what to train on")
        seed: int = opt(0, "seed of everything random")

    config = load(Config, ["--config", "my.toml", "--data.sources=a.txt,b.txt", "--seed=1"], "tritium sft", "…")

A class is flattened into a table of leaves ("data.sources" → type, default, meaning). TOML files, mappings and
arguments are each checked against that table, so that every mistake is reported where it was made, then merged
(the later wins) and built. `none` stands for None, which TOML cannot write.
"""

import copy
import dataclasses
import difflib
import json
import os
import shutil
import textwrap
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from operator import attrgetter, ge, gt, le, lt
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class UserError(Exception):
    """A mistake of the user's. The message says what was wrong, where, and what to do; no traceback is shown."""


class ConfigError(UserError, ValueError):
    """A mistake in a configuration."""


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()


BOUNDS = {  # name → in words, a sign, whether it holds
    "least": ("at least", "≥", ge),
    "above": ("above", ">", gt),
    "most": ("at most", "≤", le),
    "below": ("below", "<", lt),
}


def opt(default: Any, help: str, *, choices: Sequence | None = None, only: Sequence = (), **bounds: float) -> Any:
    """A dataclass field that knows its meaning.

    `default` is a value, a dataclass type or instance (a nested section), or REQUIRED (must be given; keyword-only
    in Python). Mutable defaults are copied for each instance. `choices` lists the values that are allowed;
    `bounds` (least, above, most, below) hold for numbers, once the class's __post_init__ asks `check_ranges`; `only`
    says with which values of another option this one has a use, which `check_used` asks.
    """
    choices = None if choices is None else tuple(choices)
    metadata = {"help": help, "choices": choices, "bounds": bounds, "only": only}
    if default is REQUIRED:
        return dataclasses.field(kw_only=True, metadata=metadata)
    if isinstance(default, type) and dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_ranges(config: Any, section: str = "") -> None:
    """Hold the fields of a dataclass to their `opt`'s bounds; `section` ("grpo.") stands before their names.

    Raises: ConfigError.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for name, bound in field.metadata.get("bounds", {}).items():
            words, _, holds = BOUNDS[name]
            if value is not None and not holds(value, bound):
                raise ConfigError(f"{section}{field.name}={value} must be {words} {bound}")


def check_used(config: Any, by: str) -> None:
    """Hold the fields of a dataclass to their defaults where the value of its field `by` is not `only` one of theirs.

    Raises: ConfigError.
    """
    chosen = getattr(config, by)
    for field in dataclasses.fields(config):
        only, value = field.metadata.get("only", ()), getattr(config, field.name)
        if only and chosen not in only:
            default = field.default_factory() if field.default is MISSING else field.default
            if value != default:
                own = f"{by}={chosen} has none; these do: {', '.join(only)}"
                raise ConfigError(f"{field.name}={_shown(value)}: {own}")


def load(cls: type[T], argv: Sequence[str], prog: str, description: str) -> T:
    """A `cls` from command-line arguments: `--config FILE.toml`, `--a.b=value`, `--a.b value`, `--a.flag`.

    Raises: ConfigError for anything that is not a valid configuration; SystemExit(0) after printing `--help`.
    """
    if "--help" in argv or "-h" in argv:
        print(_help(cls, prog, description))
        raise SystemExit(0)
    leaves = _leaves(cls)
    files, arguments = _read_arguments(leaves, argv)
    values = {}
    for path in files:
        values |= _read_mapping(leaves, _read_toml(path), f"{path}: ")
    return _build(cls, leaves, values | arguments)


def from_dict(cls: type[T], mapping: Mapping[str, Any]) -> T:
    """A `cls` from nested mappings. Raises: ConfigError, as `load` does."""
    leaves = _leaves(cls)
    return _build(cls, leaves, _read_mapping(leaves, mapping, ""))


def to_toml(config: Any, whole: bool = True) -> str:
    """TOML text that reads back as an equal configuration; not `whole`, with what differs from the defaults alone.

    A field that is None is left out where None is its default, and is written "none" elsewhere.
    """
    lines, tables = [], {}
    table = _leaves(type(config))
    wanted = {key: leaf for key, leaf in table.items() if whole or attrgetter(key)(config) != leaf.default}
    for section, leaves in _by_section(wanted).items():
        lines += ["", f"[{section}]"] if section else []
        for leaf in leaves:
            value = attrgetter(leaf.key)(config)
            if leaf.type == dict[str, dict]:
                tables |= {f"{leaf.key}.{name}": table for name, table in value.items()}
            elif value is not None or leaf.default is not None:
                lines.append(f"{leaf.key.rpartition('.')[2]} = {_toml_value(value)}")
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {_toml_value(value)}" for key, value in table.items())]
    return "\n".join(lines).lstrip() + "\n"


def nearest(word: str, names: Sequence[str]) -> str | None:
    """The name that was probably meant by `word`, if any is close; dotted names also match by their last part."""
    last = {name.rpartition(".")[2]: name for name in reversed(names)}  # of equal last parts, the first name's
    for guess in difflib.get_close_matches(word, names, n=1):
        return guess
    for guess in difflib.get_close_matches(word.rpartition(".")[2], last, n=1):
        return last[guess]
    return None


def listed(word: str, names: Iterable[str]) -> str:
    """For an error: the name that was probably meant, if any is close, and all that there are."""
    names = list(names)
    guess = nearest(word, names)
    return (f"did you mean {guess}? " if guess else "") + f"there are {', '.join(names)}"


# ── the table of leaves ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Leaf:
    key: str  # dotted
    type: Any  # the annotation without `| None`
    optional: bool
    default: Any  # REQUIRED where there is none
    help: str
    choices: tuple | None
    bounds: dict[str, float]

    def wanted(self) -> str:
        """What a value must be, in words."""
        words = _type_words(self.type)
        if self.choices is not None:
            names = "|".join(str(choice) or "empty" for choice in self.choices)
            words = f"list of {names}" if get_origin(self.type) is list else names
        words += "".join(f" {BOUNDS[name][1]} {bound}" for name, bound in self.bounds.items())
        return words + (" or none" if self.optional else "")


def _leaves(cls: type, prefix: str = "", default: Any = None) -> dict[str, _Leaf]:
    """Every leaf of `cls` by its dotted key; defaults are those of the instance `default` where one is given."""
    table = {}
    for field, hint in _fields(cls):
        key, value = prefix + field.name, _default(field, default)
        if dataclasses.is_dataclass(hint):
            table |= _leaves(hint, key + ".", None if value is REQUIRED else value)
            continue
        inner, optional = _without_none(hint, key)
        help, choices = field.metadata.get("help", ""), field.metadata.get("choices")
        table[key] = _Leaf(key, inner, optional, value, help, choices, field.metadata.get("bounds", {}))
    return table


def _by_section(leaves: dict[str, _Leaf]) -> dict[str, list[_Leaf]]:
    """The leaves by the dotted name of their section; the outermost, "", comes first, as TOML wants it."""
    sections: dict[str, list[_Leaf]] = {"": []}
    for leaf in leaves.values():
        sections.setdefault(leaf.key.rpartition(".")[0], []).append(leaf)
    return {section: group for section, group in sections.items() if group}


def _fields(cls: type) -> list[tuple[dataclasses.Field, Any]]:
    hints = get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls) if field.init]


def _default(field: dataclasses.Field, outer: Any) -> Any:
    """The default of a field: that of the enclosing default instance, else its own; a section's may be REQUIRED."""
    if outer is not None:
        return getattr(outer, field.name)
    if field.default is not MISSING:
        return field.default
    if field.default_factory is MISSING or dataclasses.is_dataclass(field.default_factory):
        return REQUIRED  # a section given as a type: each of its fields has its own default
    return field.default_factory()


def _without_none(hint: Any, key: str) -> tuple[Any, bool]:
    """(X, True) for `X | None`, else (X, False). Raises: TypeError for an annotation that has no reader."""
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        inner = [arg for arg in get_args(hint) if arg is not types.NoneType]
        optional = len(inner) < len(get_args(hint))
        hint = inner[0] if len(inner) == 1 else hint
    scalar = (bool, int, float, str)
    origin, args = get_origin(hint), get_args(hint)
    listed = origin is list and args[0] in scalar
    tabled = origin is dict and args[0] is str and args[1] in (*scalar, dict)
    if not (hint in scalar or listed or tabled):
        raise TypeError(f"{key}: a configuration field cannot be annotated {hint}")
    return hint, optional


def _type_words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is list:
        return f"list of {_type_words(args[0])}"
    if origin is dict:
        return f"table of {_type_words(args[1])}"
    return hint.__name__


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_toml(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot read it ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None  # tomllib's message ends with the line


def _read_mapping(leaves: dict[str, _Leaf], mapping: Mapping, where: str, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into checked values by dotted key."""
    values = {}
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if key in leaves:
            values[key] = _check(leaves[key], value, f"{where}{key} = {value!r}")
        elif any(known.startswith(key + ".") for known in leaves):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}{key} = {value!r}: {key} is a section, e.g. {_first(leaves, key)}")
            values |= _read_mapping(leaves, value, where, key + ".")
        else:
            raise _unknown(leaves, where + key, key)
    return values


def _read_arguments(leaves: dict[str, _Leaf], argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The `--config` files, and the checked values of the other arguments by dotted key."""
    files, values, rest = [], {}, list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise ConfigError(f"unexpected argument {argument!r}: options are written --name=value")
        leaf = leaves.get(name)
        if leaf is None and name != "config":
            raise _unknown(leaves, "--" + name, name)
        if not equals:
            text = _following_value(leaf, rest)
        if text is None:
            raise ConfigError(f"--{name} needs a value: {leaf.wanted() if leaf else 'a TOML file'}")
        if leaf is None:
            files.append(text)
        else:
            values[name] = _check(leaf, _parse(leaf, text), f"--{name}={text}")
    return files, values


def _following_value(leaf: _Leaf | None, rest: list[str]) -> str | None:
    """The value of an option written without `=`: the next argument; a boolean may do without one."""
    if leaf is not None and leaf.type is bool:
        return rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
    return rest.pop(0) if rest and not rest[0].startswith("--") else None


def _parse(leaf: _Leaf, text: str) -> Any:
    """The value that TOML would have given for `text`; text that makes no sense stays as it is, for _check."""
    if leaf.optional and text == "none":
        return text
    origin, args = get_origin(leaf.type), get_args(leaf.type)
    if origin is list:
        return [_parse_scalar(args[0], item.strip()) for item in text.split(",")] if text else []
    if origin is dict:
        pairs = [item.partition("=") for item in text.split(",")] if text else []
        if not all(equals for _, equals, _ in pairs):
            return text
        return {name.strip(): _parse_scalar(args[1], value.strip()) for name, _, value in pairs}
    return _parse_scalar(leaf.type, text)


def _parse_scalar(kind: type, text: str) -> Any:
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    for number in (int, float) if kind in (int, float) else ():
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _check(leaf: _Leaf, value: Any, said: str) -> Any:
    """`value` as the leaf's type. `said` is how the user wrote it, for the message."""
    if leaf.optional and (value is None or value == "none"):
        return None
    try:
        value = _convert(leaf.type, value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{said}: expected {leaf.wanted()}") from None
    if leaf.choices is not None:
        for item in value if isinstance(value, list) else [value]:
            if item not in leaf.choices:
                guess = nearest(str(item), [str(choice) for choice in leaf.choices])
                hint = f"; did you mean {guess}?" if guess else ""
                raise ConfigError(f"{said}: expected one of {', '.join(map(str, leaf.choices))}{hint}")
    return value


def _convert(kind: Any, value: Any) -> Any:
    """`value` as a `kind`, losslessly. Raises: TypeError, ValueError or OverflowError."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is list and isinstance(value, (list, tuple)):
        return [_convert(args[0], item) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return {_convert(str, name): _convert(args[1], item) for name, item in value.items()}
    if kind is dict and isinstance(value, Mapping):  # a table of tables: checked by whoever knows what they hold
        return dict(value)
    if kind is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if value * 0 != 0 or (kind is int and value != int(value)):  # inf and nan; 1e6 is an int, 1.5 is not
            raise ValueError(value)
        return kind(value)
    raise TypeError(value)


def _unknown(leaves: dict[str, _Leaf], said: str, key: str) -> ConfigError:
    if any(known.startswith(key + ".") for known in leaves):
        return ConfigError(f"{said} is a section, not an option: set one of its options, e.g. {_first(leaves, key)}")
    dashes = "--" if said.startswith("--") else ""
    guess = nearest(key, [*leaves, "config", "help"] if dashes else list(leaves))
    hint = f"did you mean {dashes}{guess}?" if guess else "--help lists them"
    return ConfigError(f"{said}: no such option; {hint}")


def _first(leaves: dict[str, _Leaf], section: str) -> str:
    return next(key for key in leaves if key.startswith(section + "."))


def _build(cls: type[T], leaves: dict[str, _Leaf], values: dict[str, Any], prefix: str = "") -> T:
    """A `cls` from checked values by dotted key; what is missing has its default."""
    arguments = {}
    for field, hint in _fields(cls):
        key = prefix + field.name
        if dataclasses.is_dataclass(hint):
            arguments[field.name] = _build(hint, leaves, values, key + ".")
        else:
            arguments[field.name] = values.get(key, leaves[key].default)
            if arguments[field.name] is REQUIRED:
                raise ConfigError(f"--{key} must be given: {leaves[key].help or 'it has no default'}")
    return cls(**arguments)


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)  # repr(float) is exact, and TOML reads inf, nan and 1e-05
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_value(name)} = {_toml_value(item)}" for name, item in value.items()) + "}"
    # JSON's escapes are TOML's, but for DEL; \u surrogate pairs are not, so non-ASCII text stays as it is.
    return json.dumps(os.fspath(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _help(cls: type, prog: str, description: str) -> str:
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    lines = [*textwrap.wrap(description, width), "", f"usage: {prog} [--config FILE.toml] [--name=value …]", ""]
    lines += textwrap.wrap(
        "The command line wins over files, and of several files the later one. Lists are written a,b,c and tables "
        "x=1,y=2; none is no value; a boolean may be written without one.",
        width,
    )
    for section, leaves in _by_section(_leaves(cls)).items():
        lines += ["", f"[{section}] {_section_help(cls, section)}".rstrip() if section else "options:"]
        for leaf in leaves:
            default = "must be given" if leaf.default is REQUIRED else f"default {_shown(leaf.default)}"
            lines.append(f"  --{leaf.key}  ({leaf.wanted()}; {default})")
            lines += textwrap.wrap(leaf.help, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _section_help(cls: type, section: str) -> str:
    """The meaning of a nested section, followed down its dotted name."""
    text = ""
    for name in section.split("."):
        field, cls = next((field, hint) for field, hint in _fields(cls) if field.name == name)
        text = field.metadata.get("help", "")
    return text


def _shown(value: Any) -> str:
    """A default as one would write it on the command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(str, value)) or "empty"
    if isinstance(value, dict):
        return ",".join(f"{name}={item}" for name, item in value.items()) or "empty"
    return str(value) if value != "" else "empty"
