"""What an expression of a constructor may be, as far as engine tables need it."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from experiments.engine_tables.sources import Class, Module

QUANTIZATION = "quant_config"
"""The argument and the attribute by which both engines hand a quantization on."""

SETTINGS = "vllm_config"

NONE, QUANTIZED, OTHER = "none", "quantized", "other"

Values = frozenset[object]
"""Everything that an expression may be; a condition makes it more than one thing."""

UNKNOWN: Values = frozenset([OTHER])


@dataclass(eq=False)
class Instance:
    """An object that a constructor makes, with what it keeps in its attributes."""

    kind: Class | None
    """None for an engine's settings, and for classes outside of the wheel."""
    attributes: dict[str, Values] = field(default_factory=dict)
    leaf: str = ""
    """`linear` or `experts`; nothing for a module of modules."""
    quantized: Values = frozenset()
    """Of a leaf: the quantization that it is given."""


@dataclass(eq=False)
class Several:
    """What a list or a dictionary holds."""

    items: Values


@dataclass(eq=False)
class Pack:
    """A dictionary with text for keys, such as `**kwargs`."""

    keywords: dict[str, Values]


@dataclass(eq=False)
class Scope:
    """Local names of one call."""

    module: Module
    names: dict[str, Values]
    owner: Instance | None = None
    """`self` of the method that runs."""
    home: Class | None = None
    """The class that defines it, behind which `super()` looks."""
    outer: "Scope | None" = None
    returned: set[object] = field(default_factory=set)
    branches: int = 0
    """Conditions around the statement; inside of one, an assignment adds to what was."""

    def set(self, name: str, values: Values) -> None:
        assign(self.names, name, values, adds=self.branches > 0)

    def get(self, name: str) -> Values | None:
        """What the name is here or in the calls around, or None."""
        if name in self.names:
            return self.names[name]
        return self.outer.get(name) if self.outer is not None else None


@dataclass(eq=False)
class Function:
    """A function, method or lambda with the names that it sees."""

    module: Module
    node: ast.FunctionDef | ast.Lambda
    scope: Scope | None = None
    owner: Instance | None = None
    home: Class | None = None

    @property
    def is_method(self) -> bool:
        """Whether its first argument is an object that the call does not name."""
        marks = self.node.decorator_list if isinstance(self.node, ast.FunctionDef) else ()
        is_static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in marks)
        return self.home is not None and self.scope is None and not is_static


@dataclass(eq=False)
class Partial:
    """A callable with arguments given beforehand."""

    target: object
    arguments: tuple[Values, ...]
    keywords: dict[str, Values]


def assign(names: dict[str, Values], name: str, values: Values, *, adds: bool) -> None:
    """Give a name its values; `adds` keeps those that it had."""
    before = names.get(name) if adds else None
    names[name] = values | before if before else values


def settings() -> Values:
    """An engine's settings with a quantization."""
    return frozenset([Instance(None, {QUANTIZATION: frozenset([QUANTIZED])})])


def unknown_attribute(name: str) -> Values:
    """What an attribute of something unknown is by its name."""
    if name == QUANTIZATION:
        return frozenset([QUANTIZED])
    return settings() if name == SETTINGS else UNKNOWN


def union(several: Iterator[Values] | list[Values] | tuple[Values, ...]) -> Values:
    """Everything that one of the expressions may be."""
    return frozenset().union(*several)


def items(values: Values) -> Values:
    """What lists hold, and single values themselves."""
    return union([items(v.items) if isinstance(v, Several) else frozenset([v]) for v in values])


def key(values: Values) -> object:
    """What tells values apart as arguments; settings change while constructors run."""
    return frozenset(
        (value, value.attributes.get(QUANTIZATION)) if _is_settings(value) else value
        for value in values
    )


def _is_settings(value: object) -> bool:
    return isinstance(value, Instance) and value.kind is None and not value.leaf


def leaves(
    module: Instance, path: str = "", above: tuple[Instance, ...] = ()
) -> Iterator[tuple[str, Instance]]:
    """Linears and experts with their paths; `*` stands for the index in a list."""
    if module.leaf:
        yield path, module
        return
    for name, values in module.attributes.items():
        own = f"{path}.{name}" if path else name
        for value in values:
            is_list = isinstance(value, Several)
            for item in items(frozenset([value])):
                if isinstance(item, Instance) and item is not module and item not in above:
                    yield from leaves(item, f"{own}.*" if is_list else own, (*above, module))
