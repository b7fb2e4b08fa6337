"""`autoquant env`: what a bug report needs."""

from typing import Any

import click

from autoquant.cli.options import HeadedCommand, format_option
from autoquant.cli.output import print_fields, print_json


@click.command(
    "env",
    cls=HeadedCommand,
    examples=[("autoquant env --format json", "For a bug report:")],
)
@format_option
def command(format: str) -> None:
    """Print versions, machine, GPUs, kernels and environment."""
    from autoquant.environment import describe

    facts = describe()
    if format == "json":
        print_json(facts)
    else:
        print_fields(_lines(facts))


def _lines(facts: dict[str, Any]) -> dict[str, object]:
    machine = facts["machine"]
    return {
        "autoquant": f"{facts['autoquant']} ({facts['commit'] or 'no checkout'})",
        "python": facts["python"],
        **{name: version or "-" for name, version in facts["packages"].items()},
        "system": machine["system"],
        "cpu": f"{machine['cpu'] or '-'}, {machine['cores']} cores",
        "cpu flags": " ".join(machine["cpu_flags"]) or "-",
        "memory": _gib(machine["memory_bytes"]),
        "gpus": ", ".join(map(_gpu, facts["gpus"])) or "none",
        "kernels": ", ".join(f"{device}: {name}" for device, name in facts["kernels"].items()),
        "cpu products": f"{facts['cpu_products']['policy']} ({facts['cpu_products']['reason']})",
        **{name: value or "-" for name, value in facts["variables"].items()},
    }


def _gpu(gpu: dict[str, Any]) -> str:
    return f"{gpu['name']} (sm {gpu['capability']}, {_gib(gpu['memory_bytes'])})"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
