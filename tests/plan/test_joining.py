"""What becomes one matrix where engines differ; the first that is named has the word."""

from dataclasses import dataclass, field
from types import SimpleNamespace

from autoquant.plan.joining import matrices


@dataclass(frozen=True)
class Engine:
    """Stands for an engine's table of one architecture."""

    engine: str
    known: tuple[str, ...]
    joined: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unquantized: tuple[str, ...] = ()

    def module(self, name):
        return name if name in self.known else None

    def joined_in(self, block):
        return [SimpleNamespace(path=path, parts=parts) for path, parts in self.joined.items()]

    def unquantized_in(self, block):
        return frozenset(self.unquantized)


A, B, C, D = BLOCK = tuple(f"mixer.{name}" for name in "abcd")


def test_a_linear_is_known_where_the_first_engine_knows_it():
    found = matrices(BLOCK, (Engine("one", (A, B)), Engine("other", (B, C))))
    assert [found[name].role for name in BLOCK] == ["other", "other", "unknown", "unknown"]


def test_what_engines_join_in_different_ways_is_one_matrix_by_its_first_name():
    one = Engine("one", BLOCK, {"mixer.ab": (A, B), "mixer.cd": (C, D)})
    other = Engine("other", BLOCK, {"mixer.bc": (B, C)})
    assert {matrix.name for matrix in matrices(BLOCK, (one,)).values()} == {"mixer.ab", "mixer.cd"}
    found = matrices(BLOCK, (one, other))
    assert {(matrix.name, matrix.parts) for matrix in found.values()} == {("mixer.ab", BLOCK)}


def test_what_the_first_engine_builds_unquantized_is_closed_and_what_another_does_is_a_caution():
    one = Engine("one", (A, B), unquantized=(A,))
    other = Engine("other", (A, B, C), unquantized=(B, C))
    found = matrices(BLOCK, (one, other))
    closed = {name: matrix.closed for name, matrix in found.items() if matrix.closed}
    assert closed == {
        A: "one builds it without a quantization",
        C: "other builds it without a quantization",
    }
    assert {name: matrix.caution for name, matrix in found.items() if matrix.caution} == {
        B: "other"
    }
