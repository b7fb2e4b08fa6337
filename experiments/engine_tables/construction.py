"""Which modules a model class builds, read from its constructors without running them.

Every branch is taken, so that a path is found whatever a config says; where branches disagree on
a quantization, both answers are kept.
"""

import ast
import re
from collections.abc import Callable, Iterable, Mapping

from experiments.engine_tables.expressions import Expressions
from experiments.engine_tables.sources import Class, External, Wheel
from experiments.engine_tables.values import (
    NONE,
    OTHER,
    QUANTIZATION,
    QUANTIZED,
    SETTINGS,
    UNKNOWN,
    Function,
    Instance,
    Pack,
    Partial,
    Scope,
    Several,
    Values,
    assign,
    items,
    key,
    settings,
    union,
)

DEPTH = 60
"""Calls inside calls; deeper ones are not followed."""

CALLS = 100_000
"""Of one model; a model that makes more is read no further."""

LINEARS = "LinearBase"
"""What both engines derive their linears from; its constructor knows the quantization."""

EXPERTS = re.compile(r"\w*FusedMoE(Factory)?")
"""Names of what both engines make routed experts with."""

FACTORIES_OF_LAYERS = {"make_layers", "make_pp_layers", "make_layers_non_pp"}
REGISTERED = "init_vllm_registered_model"
CONTAINERS = {"ModuleList", "ModuleDict", "Sequential"}
ITERATING = {"next", "iter", "list", "tuple", "reversed"}
ADDING = {"append", "insert", "extend", "add_module"}


class Builder(Expressions):
    """Runs constructors on sets of values.

    Args:
        wheel: the engine's sources.
        architectures: model classes by the names in a config's `architectures`.
    """

    def __init__(self, wheel: Wheel, architectures: Mapping[str, Class]) -> None:
        super().__init__(wheel)
        self._architectures = architectures
        self.visited: dict[Class, None] = {}
        """Classes whose constructors ran."""
        self._made: dict[object, Instance] = {}
        self._depth = self._calls = 0

    def build(self, kind: Class) -> Instance:
        """The module that the class makes of an engine's settings with a quantization."""
        given = {SETTINGS: settings(), QUANTIZATION: frozenset([QUANTIZED])}
        return self._instance(kind, (), given)

    def _instance(
        self, kind: Class, arguments: tuple[Values, ...], keywords: dict[str, Values]
    ) -> Instance:
        if any(map(EXPERTS.fullmatch, kind.names)):
            return _experts(kind, keywords)
        known = (kind, *map(key, arguments), *((n, key(v)) for n, v in keywords.items()))
        if known not in self._made:
            made = self._made[known] = Instance(kind)
            self.visited[kind] = None
            self._construct(made, None, arguments, keywords)
        return self._made[known]

    def _construct(
        self,
        made: Instance,
        after: Class | None,
        arguments: tuple[Values, ...],
        keywords: dict[str, Values],
    ) -> None:
        """Run the object's constructor, or the one that `super()` means inside of `after`."""
        found = made.kind.find("__init__", after) if made.kind is not None else None
        if found is None or not isinstance(found[1], ast.FunctionDef):
            return
        home, node = found
        scope = Scope(home.module, {}, owner=made, home=home)
        self._bind(scope, node, (frozenset([made]), *arguments), keywords)
        if home.name == LINEARS:
            made.leaf, made.quantized = "linear", scope.names.get(QUANTIZATION, UNKNOWN)
        else:
            self._run(node.body, scope)

    def _bind(
        self,
        scope: Scope,
        node: ast.FunctionDef | ast.Lambda,
        arguments: tuple[Values, ...],
        keywords: dict[str, Values],
    ) -> None:
        """Give the parameters of a function their arguments, or else their defaults."""
        spec = node.args
        names = [argument.arg for argument in (*spec.posonlyargs, *spec.args)]
        only = [argument.arg for argument in spec.kwonlyargs]
        defaults = [*zip(reversed(names), reversed(spec.defaults), strict=False)]
        defaults += [(n, v) for n, v in zip(only, spec.kw_defaults, strict=True) if v is not None]
        for name, value in defaults:
            scope.names[name] = self.value(value, Scope(scope.module, {}))
        scope.names |= zip(names, arguments, strict=False)
        scope.names |= {n: v for n, v in keywords.items() if n in names or n in only}
        if spec.kwarg is not None:
            rest = {n: v for n, v in keywords.items() if n not in names and n not in only}
            scope.names[spec.kwarg.arg] = frozenset([Pack(rest)])
        if spec.vararg is not None:
            scope.names[spec.vararg.arg] = frozenset([Several(union(arguments[len(names) :]))])

    def _run(self, body: Iterable[ast.stmt], scope: Scope) -> None:
        for statement in body:
            self._step(statement, scope)

    def _step(self, statement: ast.stmt, scope: Scope) -> None:
        match statement:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self.assign(target, self.value(value, scope), value, scope)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self.assign(target, self.value(value, scope), value, scope)
            case ast.Expr(value=value):
                self.value(value, scope)
            case ast.Return(value=ast.expr() as value):
                scope.returned |= self.value(value, scope)
            case ast.If(body=body, orelse=orelse):
                self._run_any([body, orelse], scope)
            case ast.For(target=target, iter=iterated, body=body):
                self.assign(target, items(self.value(iterated, scope)), iterated, scope)
                self._run_any([body], scope)
            case ast.While(body=body):
                self._run_any([body], scope)
            case ast.With(body=body):
                self._run(body, scope)
            case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=final):
                self._run([*body, *orelse], scope)
                self._run_any([handler.body for handler in handlers], scope)
                self._run(final, scope)
            case ast.FunctionDef(name=name):
                own = Function(scope.module, statement, scope, scope.owner, scope.home)
                scope.set(name, frozenset([own]))

    def _run_any(self, bodies: Iterable[list[ast.stmt]], scope: Scope) -> None:
        """Run branches of which any may be taken."""
        scope.branches += 1
        for body in bodies:
            self._run(body, scope)
        scope.branches -= 1

    def assign(self, target: ast.expr, values: Values, source: ast.expr, scope: Scope) -> None:
        match target:
            case ast.Name(id=name):
                scope.set(name, values)
            case ast.Attribute(value=owner, attr=name):
                for instance in self.value(owner, scope):
                    if isinstance(instance, Instance):
                        assign(instance.attributes, name, values, adds=scope.branches > 0)
            case ast.Tuple(elts=targets) if isinstance(source, ast.Tuple):
                for own, value in zip(targets, source.elts, strict=False):
                    self.assign(own, self.value(value, scope), value, scope)
            case ast.Tuple(elts=targets):
                for own in targets:
                    self.assign(own, values, source, scope)
            case ast.Subscript(value=owner, slice=index):
                for container in self.value(owner, scope):
                    if isinstance(container, Pack) and isinstance(index, ast.Constant):
                        container.keywords[index.value] = values
                self._add(self.value(owner, scope), values)

    def _add(self, containers: Values, values: Values) -> None:
        for container in containers:
            if isinstance(container, Several):
                container.items |= values

    def call(self, node: ast.Call, scope: Scope) -> Values:
        arguments = tuple(self.value(argument, scope) for argument in node.args)
        keywords = self._keywords(node, scope)
        match node.func:
            case ast.Name(id="dict"):
                return frozenset([Pack(keywords)])
            case ast.Name(id=name) if name in ITERATING:
                return items(union(arguments))
            case ast.Name(id="type") if arguments:
                kinds = (own.kind for own in arguments[0] if isinstance(own, Instance))
                return frozenset(kind for kind in kinds if kind is not None)
            case ast.Name(id=name) if name == REGISTERED:
                return self._registered(node)
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                return self._guarded(lambda: self._super(name, arguments, keywords, scope))
            case ast.Attribute(value=owner, attr=name) if name in ADDING:
                self._add(self.value(owner, scope), items(union(arguments)))
                return UNKNOWN
        is_quantization = isinstance(node.func, ast.Attribute) and QUANTIZATION in node.func.attr
        return union(
            [
                frozenset([QUANTIZED])
                if is_quantization and target == OTHER
                else self._guarded(
                    lambda target=target: self._apply(target, arguments, keywords, scope)
                )
                for target in self.value(node.func, scope)
            ]
        )

    def _keywords(self, node: ast.Call, scope: Scope) -> dict[str, Values]:
        """Named arguments; a `**` that cannot be followed may hold a quantization."""
        found: dict[str, Values] = {}
        for keyword in node.keywords:
            value = self.value(keyword.value, scope)
            if keyword.arg is not None:
                found[keyword.arg] = value
                continue
            packs = [own for own in value if isinstance(own, Pack)]
            for pack in packs:
                found |= pack.keywords
            if not packs:
                found.setdefault(QUANTIZATION, UNKNOWN)
        return found

    def _guarded(self, work: Callable[[], Values]) -> Values:
        self._calls += 1
        if self._depth >= DEPTH or self._calls > CALLS:
            return UNKNOWN
        self._depth += 1
        try:
            return work()
        finally:
            self._depth -= 1

    def _registered(self, node: ast.Call) -> Values:
        """A language model inside of another, by the names of its architecture."""
        names = next((k.value for k in node.keywords if k.arg == "architectures"), None)
        if not isinstance(names, ast.List):
            return UNKNOWN
        kinds = (self._architectures.get(ast.literal_eval(name)) for name in names.elts)
        return frozenset(self.build(kind) for kind in kinds if kind is not None) or UNKNOWN

    def _super(
        self,
        name: str,
        arguments: tuple[Values, ...],
        keywords: dict[str, Values],
        scope: Scope,
    ) -> Values:
        made = scope.owner
        if made is None or made.kind is None:
            return UNKNOWN
        if name == "__init__":
            self._construct(made, scope.home, arguments, keywords)
            return UNKNOWN
        own = made.kind.find(name, scope.home)
        if own is None or not isinstance(own[1], ast.FunctionDef):
            return UNKNOWN
        method = Function(own[0].module, own[1], None, made, own[0])
        return self._returned(method, arguments, keywords)

    def _apply(
        self,
        target: object,
        arguments: tuple[Values, ...],
        keywords: dict[str, Values],
        scope: Scope,
    ) -> Values:
        match target:
            case Class() if target.is_module:
                return frozenset([self._instance(target, arguments, keywords)])
            case Partial(target=inner, arguments=first, keywords=given):
                return self._apply(inner, first + arguments, given | keywords, scope)
            case Function(node=ast.FunctionDef(name="__init__"), home=Class() as home):
                self._explicit_init(home, arguments[1:], keywords, scope)
                return UNKNOWN
            case Function(node=ast.FunctionDef(name=name)) if name in FACTORIES_OF_LAYERS:
                return frozenset([Several(self._layers(arguments, keywords, scope))])
            case Function(node=ast.FunctionDef(name=name)) if EXPERTS.fullmatch(name):
                return frozenset([_experts(None, keywords)])
            case Function():
                return self._returned(target, arguments, keywords)
            case External(name=name):
                return _external(name, arguments, keywords)
        return UNKNOWN

    def _explicit_init(
        self,
        home: Class,
        arguments: tuple[Values, ...],
        keywords: dict[str, Values],
        scope: Scope,
    ) -> None:
        """`Base.__init__(self, ...)`."""
        made = scope.owner
        order = made.kind.order if made is not None and made.kind is not None else []
        if home in order[1:]:
            self._construct(made, order[order.index(home) - 1], arguments, keywords)

    def _layers(
        self, arguments: tuple[Values, ...], keywords: dict[str, Values], scope: Scope
    ) -> Values:
        """What the function that a factory of layers is given makes."""
        given = union([*arguments, *keywords.values()])
        made = [v for v in given if isinstance(v, Function | Partial | Class)]
        return union([self._apply(value, (), {}, scope) for value in made])

    def _returned(
        self, function: Function, arguments: tuple[Values, ...], keywords: dict[str, Values]
    ) -> Values:
        node = function.node
        scope = Scope(function.module, {}, function.owner, function.home, function.scope)
        if function.is_method:
            own = frozenset([function.owner]) if function.owner is not None else UNKNOWN
            arguments = (own, *arguments)
        self._bind(scope, node, arguments, keywords)
        if isinstance(node, ast.Lambda):
            return self.value(node.body, scope)
        self._run(node.body, scope)
        return frozenset(scope.returned) or UNKNOWN


def _experts(kind: Class | None, keywords: dict[str, Values]) -> Instance:
    given = keywords.get(QUANTIZATION, frozenset([NONE]))
    return Instance(kind, leaf="experts", quantized=given)


def _external(name: str, arguments: tuple[Values, ...], keywords: dict[str, Values]) -> Values:
    """Calls of PyTorch and of Python's own library; an unknown one may wrap a module."""
    last = name.rpartition(".")[2]
    if last == "partial" and arguments:
        return frozenset(Partial(own, arguments[1:], keywords) for own in arguments[0])
    if last == "Linear":
        return frozenset([Instance(None, leaf="linear", quantized=frozenset([NONE]))])
    given = union([*arguments, *keywords.values()])
    modules = frozenset(value for value in given if isinstance(value, Instance | Several))
    if last in CONTAINERS:
        return frozenset([Several(items(modules))])
    return modules or UNKNOWN
