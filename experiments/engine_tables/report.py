"""What differs between two engine tables, in lines for a person."""

from collections.abc import Iterator, Mapping
from typing import Any


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """One line for every engine, architecture and path that differs."""
    for engine, table in after["engines"].items():
        old = before.get("engines", {}).get(engine, {"version": "none", "architectures": {}})
        if old["version"] != table["version"]:
            yield f"{engine}: {old['version']} -> {table['version']}"
        was, now = _whole(old["architectures"]), _whole(table["architectures"])
        yield from (f"{engine}: new architecture {name}" for name in sorted(now.keys() - was))
        yield from (
            f"{engine}: no architecture {name} any more" for name in sorted(was.keys() - now)
        )
        for name in sorted(was.keys() & now):
            yield from (f"{engine}, {name}: {line}" for line in _differences(was[name], now[name]))
        bare, own = (set(one.get("without_table", ())) for one in (old, table))
        yield from (f"{engine}: + {name}, without a table" for name in sorted(own - bare))
        yield from (f"{engine}: - {name}, without a table" for name in sorted(bare - own))
    was, now = before.get("model_types", {}), after["model_types"]
    for kind in sorted(was.keys() | now):
        if was.get(kind) != now.get(kind):
            yield f"model_type {kind}: {was.get(kind)} -> {now.get(kind)}"


def _whole(architectures: Mapping[str, Any]) -> dict[str, Any]:
    """Every architecture with its own table, also where it has that of another."""
    return {
        name: architectures[table] if isinstance(table, str) else table
        for name, table in architectures.items()
    }


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key in after:
        was, now = before.get(key) or {}, after[key]
        if isinstance(now, dict):
            for path in sorted({*was, *now}):
                if (old := _text(was, path)) != (new := _text(now, path)):
                    yield f"{key} {path}: {old} -> {new}"
        else:
            yield from (f"{key}: + {path}" for path in now if path not in was)
            yield from (f"{key}: - {path}" for path in was if path not in now)


def _text(table: Mapping[str, Any], path: str) -> str:
    value = table.get(path, "nothing")
    return value if isinstance(value, str) else ", ".join(value)
