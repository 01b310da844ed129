"""Dataclasses that read and write JSON: what the parts of a report have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

AnyRecord = TypeVar("AnyRecord", bound="Record")


class Record:
    """A dataclass whose fields all have defaults, to and from JSON by the names of its fields."""

    LATER: ClassVar[tuple[str, ...]] = ()  # fields that are left out of the JSON where they are None, as once they were

    @classmethod
    def from_json(cls: type[AnyRecord], data: dict[str, Any]) -> AnyRecord:
        """The record in a dict. A field that is missing or null, or that should be an object or a list and is
        something else, gets its default. Numbers and texts are taken as they are, unknown fields are left out."""
        values = {}
        for name, kind in _kinds(cls).items():  # type: ignore[arg-type]
            value = _read(kind, data.get(name))
            if value is not None:
                values[name] = value
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The record as plain values for JSON."""
        return self.json_of([one.name for one in fields(self)])  # type: ignore[arg-type]

    def json_of(self, names: Sequence[str]) -> dict[str, Any]:
        """These fields, in this order, as plain values for JSON."""
        values = {name: _plain(getattr(self, name)) for name in names}
        return {name: value for name, value in values.items() if value is not None or name not in self.LATER}


@cache
def _kinds(record: type) -> dict[str, Any]:
    """The type of each field."""
    hints = get_type_hints(record)
    return {one.name: hints[one.name] for one in fields(record)}


def _read(kind: Any, value: Any) -> Any:
    """A JSON value as a field of this type; None if it is null or cannot be one."""
    if get_origin(kind) in (Union, UnionType):
        records = [one for one in get_args(kind) if is_dataclass(one) or get_origin(one) is tuple]
        kind = records[0] if records else Any
    inner = get_args(kind)
    if is_dataclass(kind):
        return kind.from_json(value) if isinstance(value, dict) else None  # type: ignore[union-attr]
    if get_origin(kind) is tuple:
        items = [_read(inner[0], item) for item in value] if isinstance(value, list) else None
        return None if items is None else tuple(item for item in items if item is not None)
    if get_origin(kind) is dict:
        return {key: _read(inner[1], item) for key, item in value.items()} if isinstance(value, dict) else None
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
