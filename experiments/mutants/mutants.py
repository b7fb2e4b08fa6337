"""Mutants of some files: what cosmic-ray's operators change, less what changes no behaviour.

pip install cosmic-ray
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

OPERATORS = (
    "AddNot",
    "NumberReplacer",
    "ReplaceAndWithOr",
    "ReplaceOrWithAnd",
    "ReplaceTrueWithFalse",
    "ReplaceFalseWithTrue",
    "ReplaceBreakWithContinue",
    "ReplaceContinueWithBreak",
    "ZeroIterationForLoop",
    "ReplaceBinaryOperator_Add_Sub",
    "ReplaceBinaryOperator_Sub_Add",
    "ReplaceBinaryOperator_Mul_Div",
    "ReplaceBinaryOperator_Div_Mul",
    "ReplaceBinaryOperator_FloorDiv_Mul",
    "ReplaceBinaryOperator_Mod_Mul",
    "ReplaceBinaryOperator_Pow_Mul",
    "ReplaceBinaryOperator_BitAnd_BitOr",
    "ReplaceComparisonOperator_Lt_LtE",
    "ReplaceComparisonOperator_LtE_Lt",
    "ReplaceComparisonOperator_Gt_GtE",
    "ReplaceComparisonOperator_GtE_Gt",
    "ReplaceComparisonOperator_Lt_Gt",
    "ReplaceComparisonOperator_Gt_Lt",
    "ReplaceComparisonOperator_LtE_GtE",
    "ReplaceComparisonOperator_GtE_LtE",
    "ReplaceComparisonOperator_Eq_NotEq",
    "ReplaceComparisonOperator_NotEq_Eq",
    "ReplaceComparisonOperator_Is_IsNot",
    "ReplaceComparisonOperator_IsNot_Is",
    "ReplaceUnaryOperator_Delete_Not",
    "ReplaceUnaryOperator_Delete_USub",
)
"""One or two for each kind of expression: more say the same of a test again."""
HARMLESS = {"frozen", "repr", "strict", "exist_ok", "non_blocking"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One file with one change."""

    file: str
    line: int
    operator: str
    source: str
    statement: range | None
    """Lines of the changed statement; None outside of functions."""

    @property
    def key(self) -> tuple[str, int, str, str]:
        """Names it among the mutants of a commit."""
        return self.file, self.line, self.operator, self.change

    @property
    def change(self) -> str:
        """The changed line."""
        return self.source.splitlines()[self.line - 1].strip()


def mutants(root: Path, file: str) -> Iterator[Mutant]:
    """Yield the mutants of a file, each once."""
    source = (root / file).read_text(encoding="utf-8")
    nodes = list(ast_nodes(get_ast_from_path(root / file)))
    tree = ast.parse(source)
    seen = {_without_the_harmless(source), None}
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        places = sum(len(list(operator.mutation_positions(node))) for node in nodes)
        for place in range(places):
            changed = mutate_code(source, operator, place)
            program = _without_the_harmless(changed)
            if program in seen:
                continue
            seen.add(program)
            line = _first_difference(source, changed)
            yield Mutant(
                file=file,
                line=line,
                operator=name,
                source=changed,
                statement=_statement(tree, line),
            )


def _without_the_harmless(source: str) -> str | None:
    """The program as text, less what a change of does nothing; None where it is no program.

    Arguments of a class's decorator (frozen, slots, kw_only) and of a model's configuration guard
    against mistakes of programmers, as does how arguments may be passed; `repr` is for their eyes,
    and `strict` of a zip asserts.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            node.decorator_list = []
        elif isinstance(node, ast.arguments):
            node.args = node.posonlyargs + node.args + node.kwonlyargs
            node.defaults += [default for default in node.kw_defaults if default is not None]
            node.posonlyargs, node.kwonlyargs, node.kw_defaults = [], [], []
        elif isinstance(node, ast.Call):
            node.keywords = [k for k in node.keywords if k.arg not in HARMLESS]
    return ast.dump(tree)


def _first_difference(source: str, changed: str) -> int:
    pairs = zip(source.splitlines(), changed.splitlines(), strict=False)
    return next(line for line, (a, b) in enumerate(pairs, start=1) if a != b)


def _statement(tree: ast.Module, line: int) -> range | None:
    """The lines of the smallest statement there, of one with a body those before it."""
    found, is_inside = None, False
    for node in ast.walk(tree):  # from the outside in
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno or 0
            found = range(node.lineno, max(last, node.lineno) + 1)
            is_inside |= isinstance(node, ast.FunctionDef) and line >= node.body[0].lineno
    return found if is_inside else None
