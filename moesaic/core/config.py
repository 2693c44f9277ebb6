"""Frozen, typed configuration read from YAML; an unknown key is an error with the nearest name.

Floats follow YAML 1.2: ``1e-5`` is a number, where PyYAML's YAML 1.1 rules make it a string.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from moesaic.core.errors import UserError, nearest

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every configuration: frozen, no unknown keys, docstrings become descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True
    )


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats and booleans: ``1e-5`` is a float; ``on`` and ``no`` are strings."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - overrides PyYAML's class attribute, same form
        first: [(tag, rule) for tag, rule in rules if not tag.endswith((":bool", ":float"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?[0-9]+[eE][-+]?[0-9]+$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _no_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            line = node.value[index][0].start_mark.line + 1
            raise UserError(f"line {line}: key '{key}' is given twice. Keep one.")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _no_duplicates)


def parse_yaml(text: str, *, source: str) -> Any:
    """Parse one YAML document. Raises UserError naming `source` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        raise UserError(f"{where}: not valid YAML: {problem}. Correct that line.") from None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping (an empty file is an empty mapping)."""
    path = Path(path)
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file.{nearest(path.name, siblings)} Give a YAML file.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8. Give a YAML file.") from None
    data = parse_yaml(text, source=str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(
            f"{path}: holds a {type(data).__name__}, not a mapping. Write key: value lines."
        )
    return data


def override(data: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply ``a.b=c`` assignments to nested mappings; values are read as YAML. Returns a copy."""
    result: dict[str, Any] = {**data}
    for assignment in assignments:
        keys, equals, value = assignment.partition("=")
        if not equals or not all(keys.split(".")):
            raise UserError(f"--set {assignment}: write key=value or section.key=value.")
        inner = result
        *sections, last = keys.strip().split(".")
        for section in sections:
            below = inner.get(section)
            if below is not None and not isinstance(below, dict):
                raise UserError(f"--set {assignment}: '{section}' is a value, not a section.")
            inner[section] = {**(below or {})}
            inner = inner[section]
        inner[last] = parse_yaml(value, source=f"--set {keys}")
    return result


def parse(cls: type[C], data: Mapping[str, Any], *, source: str) -> C:
    """Validate `data` as a `cls`. Raises UserError: one line with the key and the nearest one."""
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(cls, error, data)}") from None


def load(cls: type[C], path: Path | str, *, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file as a `cls`, after applying ``a.b=c`` overrides."""
    return parse(cls, override(read_yaml(path), overrides), source=str(path))


def to_yaml(config: BaseModel | Mapping[str, Any]) -> str:
    """Write a config as YAML, keys in the order of definition."""
    data = config.model_dump(mode="json") if isinstance(config, BaseModel) else dict(config)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def _explain(cls: type[BaseModel], error: ValidationError, data: Any) -> str:
    problems = error.errors(include_url=False)
    first = problems[0]
    path = _keys(first["loc"], data, missing=first["type"] == "missing")
    name = ".".join(path)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    match first["type"]:
        case "extra_forbidden":
            owner = _model_at(cls, first["loc"][:-1])
            fields = list(owner.model_fields) if owner else []
            hint = nearest(path[-1], fields)
            known = "" if hint or not fields else f" Known: {', '.join(fields)}."
            return f"unknown key '{name}'.{hint}{known}{more}"
        case "missing":
            return f"'{name}' is required. Add it.{more}"
        case "value_error":
            message = str(first["ctx"]["error"]) if "ctx" in first else first["msg"]
            return f"{name + ': ' if name else ''}{message}{more}"
        case _:
            reason = first["msg"][0].lower() + first["msg"][1:]
            return f"'{name}' is {first['input']!r}: {reason}.{more}"


def _keys(loc: Sequence[int | str], data: Any, *, missing: bool) -> list[str]:
    """The keys of `data` in an error's location; of a union pydantic also names the member."""
    keys = []
    for part in loc:
        found = isinstance(data, Mapping) and part in data
        if found or (isinstance(part, int) and isinstance(data, Sequence) and part < len(data)):
            data = data[part]
        elif not (missing and part == loc[-1]):
            continue
        keys.append(str(part))
    return keys


def _model_at(cls: type[BaseModel], loc: Sequence[int | str]) -> type[BaseModel] | None:
    """Return the model class that a pydantic error location points into, if there is just one."""
    current: type[BaseModel] = cls
    for part in loc:
        if not isinstance(part, str) or part not in current.model_fields:
            continue  # a list index, a mapping key or the tag of a union
        models = _models_in(current.model_fields[part].annotation)
        if len(models) == 1:
            current = models[0]
        else:
            tags = [model for model in models if model.__name__ in loc]
            if len(tags) != 1:
                return None
            current = tags[0]
    return current


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for inner in get_args(annotation) for model in _models_in(inner)]
