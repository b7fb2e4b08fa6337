"""Python sources inside a wheel: modules, classes and the names that they import, by their text."""

import ast
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

MODULES = (".Module", ".PreTrainedModel")
"""Endings of the names of classes outside of the wheel whose subclasses are modules."""


@dataclass(frozen=True)
class External:
    """A name from a package that the wheel does not hold: `torch.nn.Linear`."""

    name: str


@dataclass(frozen=True, eq=False)
class Definition:
    """A class, a function or an assigned expression, and the module that it stands in."""

    module: "Module"
    node: ast.ClassDef | ast.FunctionDef | ast.expr


@dataclass(eq=False)
class Module:
    """One file of the wheel."""

    name: str
    tree: ast.Module
    is_package: bool
    symbols: dict[str, ast.AST] = field(default_factory=dict)
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """Local name: module, and the name in it, or None for the module itself."""

    def __post_init__(self) -> None:
        for statement in _statements(self.tree.body):
            self._read(statement)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._read(node)

    def _read(self, statement: ast.stmt) -> None:
        match statement:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                self.symbols.setdefault(name, statement)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self.symbols.setdefault(name, value)
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                self.symbols.setdefault(name, value)
            case ast.Import(names=names):
                for alias in names:
                    own = alias.asname or alias.name.partition(".")[0]
                    target = alias.name if alias.asname else own
                    self.imports.setdefault(own, (target, None))
            case ast.ImportFrom(module=origin, names=names, level=level):
                base = self._absolute(origin or "", level)
                for alias in names:
                    self.imports.setdefault(alias.asname or alias.name, (base, alias.name))

    def _absolute(self, origin: str, level: int) -> str:
        if not level:
            return origin
        parts = self.name.split(".")
        parts = parts[: len(parts) - level + self.is_package]
        return ".".join([*parts, origin] if origin else parts)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, those behind conditions included, the first branch first."""
    for statement in body:
        yield statement
        for name in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(statement, ast.If | ast.Try):
                for inner in getattr(statement, name, ()):
                    inside = inner.body if isinstance(inner, ast.ExceptHandler) else [inner]
                    yield from _statements(inside)


class Wheel:
    """The sources of one wheel, parsed as they are asked for; nothing is executed."""

    def __init__(self, file: Path) -> None:
        self._archive = zipfile.ZipFile(file)
        self._files = set(self._archive.namelist())
        self.package, self.version = file.name.split("-")[:2]
        self._modules: dict[str, Module | None] = {}
        self._classes: dict[ast.ClassDef, Class] = {}

    def names(self, package: str) -> list[str]:
        """Names of the modules directly in a package."""
        folder = package.replace(".", "/") + "/"
        found = (f.removeprefix(folder) for f in self._files if f.startswith(folder))
        return sorted(f"{package}.{f[:-3]}" for f in found if f.endswith(".py") and "/" not in f)

    def module(self, name: str) -> Module | None:
        """The module of that name, or None if the wheel has none."""
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        return self._modules[name]

    def _parse(self, name: str) -> Module | None:
        path = name.replace(".", "/")
        for file, is_package in ((f"{path}.py", False), (f"{path}/__init__.py", True)):
            if file in self._files:
                return Module(name, ast.parse(self._archive.read(file)), is_package)
        return None

    def class_of(self, module: Module, node: ast.ClassDef) -> "Class":
        """The one object for a class definition."""
        return self._classes.setdefault(node, Class(self, module, node))

    def resolve(self, module: Module, name: str) -> Definition | External | None:
        """What a dotted name means in a module, imports followed."""
        first, _, rest = name.partition(".")
        found = self._resolve(module, first, frozenset())
        while rest and isinstance(found, External | Module):
            first, _, rest = rest.partition(".")
            if isinstance(found, Module):
                found = self._resolve(found, first, frozenset())
            else:
                found = External(f"{found.name}.{first}")
        return None if isinstance(found, Module) or rest else found

    def base(self, module: Module, node: ast.ClassDef, name: str) -> Definition | External | None:
        """A base of a class, which may have the name that the class itself takes over."""
        found = self.resolve(module, name)
        if isinstance(found, Definition) and found.node is node and name in module.imports:
            origin, inner = module.imports[name]
            source = self.module(origin)
            return self.resolve(source, inner or name) if source is not None else None
        return found

    def _resolve(
        self, module: Module, name: str, seen: frozenset[tuple[str, str]]
    ) -> Definition | External | Module | None:
        if (module.name, name) in seen:
            return None
        seen |= {(module.name, name)}
        node = module.symbols.get(name)
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.expr):
            return Definition(module, node)
        if name not in module.imports:
            return self._resolve_star(module, name, seen)
        origin, inner = module.imports[name]
        source = self.module(origin)
        if source is None:
            return External(f"{origin}.{inner}" if inner else origin)
        if inner is None:
            return source
        found = self._resolve(source, inner, seen)
        return found if found is not None else self.module(f"{origin}.{inner}")

    def _resolve_star(
        self, module: Module, name: str, seen: frozenset[tuple[str, str]]
    ) -> Definition | External | Module | None:
        if "*" not in module.imports:
            return None
        source = self.module(module.imports["*"][0])
        return self._resolve(source, name, seen) if source is not None else None


@dataclass(eq=False)
class Class:
    """A class of the wheel with its bases."""

    wheel: Wheel
    module: Module
    node: ast.ClassDef

    @property
    def name(self) -> str:
        return self.node.name

    @cached_property
    def bases(self) -> list["Class | External"]:
        found: list[Class | External] = []
        for base in self.node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            match self.wheel.base(self.module, self.node, ast.unparse(base)):
                case Definition(module=module, node=ast.ClassDef() as node):
                    found.append(self.wheel.class_of(module, node))
                case External() as external:
                    found.append(external)
        return found

    @cached_property
    def order(self) -> list["Class"]:
        """The class and its bases, as Python would look an attribute up."""
        found: dict[int, Class] = {id(self): self}
        for base in self.bases:
            if isinstance(base, Class):
                for own in base.order:
                    found.pop(id(own), None)
                    found[id(own)] = own
        return list(found.values())

    @cached_property
    def is_module(self) -> bool:
        """Whether it derives from `torch.nn.Module`."""
        return any(
            base.is_module if isinstance(base, Class) else base.name.endswith(MODULES)
            for base in self.bases
        )

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the class and of all its bases."""
        return frozenset(own.name for own in self.order)

    @cached_property
    def own(self) -> dict[str, ast.AST]:
        """Methods and attributes of the class's own body."""
        found: dict[str, ast.AST] = {}
        for statement in self.node.body:
            match statement:
                case ast.FunctionDef(name=name):
                    found[name] = statement
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    found[name] = value
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    found[name] = value
        return found

    def find(self, name: str, after: "Class | None" = None) -> tuple["Class", ast.AST] | None:
        """The first class that has the attribute, from the one behind `after` on."""
        order = self.order
        start = order.index(after) + 1 if after in order else 0
        return next(((c, c.own[name]) for c in order[start:] if name in c.own), None)
