"""Write the tables of what serving engines build, read from their wheels.

    python -m experiments.engine_tables.make                 # downloads the wheels, writes the file
    python -m experiments.engine_tables.make --wheels DIR    # with wheels that are there already
    python -m experiments.engine_tables.make --check         # exit 1 if the file would change

Nothing of a wheel is executed or installed. What changes against the file is printed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from autoquant.source.engines.tables import FILE
from experiments.engine_tables.engines import ENGINES, model_types
from experiments.engine_tables.report import changes
from experiments.engine_tables.sources import Wheel
from experiments.engine_tables.tables import table_of

SCHEMA_VERSION = 1
VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23", "transformers": "5.23.0"}
RECURSION = 20_000
"""Calls of Python: every call in an engine's constructor takes several of ours."""


def main() -> int:
    """Make the tables, report and write."""
    options = _options()
    sys.setrecursionlimit(RECURSION)
    with tempfile.TemporaryDirectory() as folder:
        wheels = {
            package: Wheel(_wheel(package, getattr(options, package), options.wheels, Path(folder)))
            for package in VERSIONS
        }
        after = tables(wheels)
    before = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    lines = list(changes(before, after))
    print("\n".join(lines) or "nothing changed")
    for engine, table in after["engines"].items():
        known = table["architectures"]
        own = sum(not isinstance(value, str) for value in known.values())
        print(f"{engine} {table['version']}: {len(known)} architectures, {own} tables")
    if options.check:
        return int(bool(lines))
    FILE.write_text(as_text(after), encoding="utf-8")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wheels", type=Path, help="a folder with the wheels")
    parser.add_argument("--check", action="store_true", help="write nothing")
    for package, version in VERSIONS.items():
        parser.add_argument(f"--{package}", default=version, metavar="VERSION")
    return parser.parse_args()


def _wheel(package: str, version: str, given: Path | None, folder: Path) -> Path:
    if given is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", folder, f"{package}=={version}"], check=True)
    found = sorted((given or folder).glob(f"{package}-{version}-*.whl"))
    if not found:
        raise SystemExit(f"{given} holds no wheel of {package} {version}")
    return found[0]


def tables(wheels: dict[str, Wheel]) -> dict[str, Any]:
    """The content of the file.

    Args:
        wheels: of both engines and of transformers, by package.
    """
    engines = {}
    for engine in ENGINES:
        wheel = wheels[engine.package]
        kinds = engine.architectures(wheel)
        found = {name: table_of(wheel, kind, kinds) for name, kind in sorted(kinds.items())}
        named = {name: table for name, table in found.items() if any(table.values())}
        engines[engine.name] = {
            "version": wheel.version,
            "without_table": sorted({*found, *engine.borrowed(wheel)} - named.keys()),
            "architectures": _without_repeats(named.items()),
        }
    known = {name for engine in engines.values() for name in engine["architectures"]}
    kinds_of = model_types(wheels["transformers"])
    return {
        "schema_version": SCHEMA_VERSION,
        "transformers": wheels["transformers"].version,
        "model_types": {kind: own for kind, own in sorted(kinds_of.items()) if own in known},
        "engines": engines,
    }


def _without_repeats(tables: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Architectures with the table of an earlier one have its name instead."""
    first: dict[str, str] = {}
    found: dict[str, Any] = {}
    for name, table in tables:
        same = first.setdefault(json.dumps(table, sort_keys=True), name)
        found[name] = table if same == name else same
    return found


def as_text(content: dict[str, Any]) -> str:
    """JSON with one line for each architecture, so that a change of one is a line of a diff."""
    engines = {
        name: _object(engine | {"architectures": _object(engine["architectures"], 3)}, 2)
        for name, engine in content["engines"].items()
    }
    return str(_object(content | {"engines": _object(engines, 1)}, 0)) + "\n"


class _Written(str):
    """JSON already."""


def _object(values: dict[str, Any], depth: int) -> _Written:
    """An object with a line for each key."""
    lines = []
    for key, value in values.items():
        text = value if isinstance(value, _Written) else json.dumps(value)
        lines.append(f"{' ' * depth} {json.dumps(key)}: {text}")
    return _Written("{\n" + ",\n".join(lines) + "}")


if __name__ == "__main__":
    sys.exit(main())
