"""Expressions of a constructor, evaluated to everything that they may be."""

import ast
from abc import ABC, abstractmethod
from collections.abc import Iterable

from experiments.engine_tables.sources import Class, Definition, External, Module, Wheel
from experiments.engine_tables.values import (
    NONE,
    UNKNOWN,
    Function,
    Instance,
    Pack,
    Scope,
    Several,
    Values,
    items,
    union,
    unknown_attribute,
)


class Expressions(ABC):
    """Evaluates expressions that call nothing; a subclass knows what calls make.

    Args:
        wheel: the engine's sources.
    """

    def __init__(self, wheel: Wheel) -> None:
        self.wheel = wheel
        self._constants: set[ast.expr] = set()
        """Constants under evaluation, of which one may name itself."""

    @abstractmethod
    def call(self, node: ast.Call, scope: Scope) -> Values:
        """What a call may return."""

    @abstractmethod
    def assign(self, target: ast.expr, values: Values, source: ast.expr, scope: Scope) -> None:
        """Give a target the values of the expression `source`."""

    def value(self, node: ast.expr, scope: Scope) -> Values:
        """What an expression may be."""
        match node:
            case ast.Constant(value=None):
                return frozenset([NONE])
            case ast.Name(id=name):
                return self._name(name, scope)
            case ast.Attribute(value=owner, attr=name):
                return self._attribute(owner, name, scope)
            case ast.Call():
                return self.call(node, scope)
            case ast.IfExp(body=body, orelse=orelse):
                return self.value(body, scope) | self.value(orelse, scope)
            case ast.BoolOp(values=values):
                return self.any_of(values, scope)
            case ast.NamedExpr(target=target, value=value):
                found = self.value(value, scope)
                self.assign(target, found, value, scope)
                return found
            case ast.Lambda():
                return frozenset([Function(scope.module, node, scope, scope.owner, scope.home)])
            case ast.Starred(value=value) | ast.Subscript(value=value):
                return items(self.value(value, scope))
        return self._several(node, scope)

    def any_of(self, nodes: Iterable[ast.expr | None], scope: Scope) -> Values:
        """What one of several expressions may be."""
        return union([self.value(node, scope) for node in nodes if node is not None])

    def _several(self, node: ast.expr, scope: Scope) -> Values:
        """Lists, dictionaries, and what comprehensions make."""
        match node:
            case ast.List(elts=values) | ast.Tuple(elts=values) | ast.Set(elts=values):
                return frozenset([Several(self.any_of(values, scope))])
            case ast.Dict(keys=keys, values=values):
                named = {
                    key.value: self.value(value, scope)
                    for key, value in zip(keys, values, strict=True)
                    if isinstance(key, ast.Constant) and isinstance(key.value, str)
                }
                return frozenset([Pack(named), Several(self.any_of(values, scope))])
            case (
                ast.ListComp(elt=element, generators=generators)
                | ast.GeneratorExp(elt=element, generators=generators)
                | ast.DictComp(value=element, generators=generators)
            ):
                for generator in generators:
                    iterated = items(self.value(generator.iter, scope))
                    self.assign(generator.target, iterated, generator.iter, scope)
                return frozenset([Several(self.value(element, scope))])
        return UNKNOWN

    def _name(self, name: str, scope: Scope) -> Values:
        local = scope.get(name)
        if local is not None:
            return local
        found = self.wheel.resolve(scope.module, name)
        return self._defined(found) if found is not None else UNKNOWN

    def _defined(self, found: Definition | External) -> Values:
        match found:
            case Definition(module=module, node=ast.ClassDef() as node):
                return frozenset([self.wheel.class_of(module, node)])
            case Definition(module=module, node=ast.FunctionDef() as node):
                return frozenset([Function(module, node)])
            case Definition(module=module, node=ast.expr() as node):
                return self._constant(module, node)
        return frozenset([found])

    def _constant(self, module: Module, node: ast.expr) -> Values:
        """What a module or a class assigns outside of functions."""
        if node in self._constants:
            return UNKNOWN
        self._constants.add(node)
        try:
            return self.value(node, Scope(module, {}))
        finally:
            self._constants.remove(node)

    def _attribute(self, owner: ast.expr, name: str, scope: Scope) -> Values:
        found = [self._member(base, name) for base in self.value(owner, scope)]
        return union(found) if found else unknown_attribute(name)

    def _member(self, base: object, name: str) -> Values:
        match base:
            case Instance(attributes=attributes) if name in attributes:
                return attributes[name]
            case Instance(kind=Class() as kind) if own := kind.find(name):
                return self._inherited(*own, base)
            case Class() if own := base.find(name):
                return self._inherited(*own, None)
            case External(name=dotted):
                return frozenset([External(f"{dotted}.{name}")])
        return unknown_attribute(name)

    def _inherited(self, home: Class, node: ast.AST, owner: Instance | None) -> Values:
        if isinstance(node, ast.FunctionDef):
            return frozenset([Function(home.module, node, None, owner, home)])
        if isinstance(node, ast.expr):
            return self._constant(home.module, node)
        return UNKNOWN
