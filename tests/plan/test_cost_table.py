"""Costs from a file: which row counts, exact steps, and what a table must not leave out."""

import pytest
from tiny_models import save_model

from autoquant.errors import ConfigError
from autoquant.formats import BF16, FP8, NVFP4, Choice
from autoquant.plan.assignment import Assignment
from autoquant.plan.cost_table import CostTable, TableFile, products
from autoquant.plan.limit import Limit
from autoquant.plan.plan import make_plan
from autoquant.plan.space_file import load_space
from autoquant.source.source import open_source

HEAD = "schema_version: 1\nunit: microseconds a token\nscale: 1000\nrows:\n"
EVERY = """
  - {role: "*", shape: "*", choice: nvfp4, cost: 1.5}
  - {role: "*", shape: "*", choice: fp8, cost: 2}
  - {role: "*", shape: "*", choice: bf16, cost: 4}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = save_model("qwen2_moe", tmp_path_factory.mktemp("table") / "model")
    return make_plan(open_source(folder), load_space("default"))


@pytest.fixture
def read(plan, tmp_path):
    def call(text, name="costs.yaml"):
        (tmp_path / name).write_text(text)
        return CostTable.read(tmp_path / name, plan.accounting)

    return call


def test_a_group_costs_what_its_products_cost_together(plan, read):
    table = read(HEAD + EVERY)
    qkv, experts = (next(g for g in plan.groups if g.role == role) for role in ("qkv", "experts"))
    # q, k and v of 64, 32 and 32 outputs are one product; gate and up of an expert, and down, and
    # the same of the shared expert, are four.
    assert list(products(qkv)) == [(128, 64)]
    assert sorted(products(experts)) == [(64, 32), (64, 48), (64, 64), (96, 64)]
    assert table.of(qkv.name, NVFP4) == table.of(qkv.name, Choice.parse("nvfp4/mse")) == 1500
    assert table.of(experts.name, FP8) == 4 * 2000
    untouched = Assignment.of({})
    count = sum(len(list(products(group))) for group in plan.groups)
    assert table.total(untouched) == count * 4000
    assert table.number(untouched) == count * 4.0
    assert table.unit.name == "microseconds a token"


def test_the_row_that_names_most_counts(plan, read):
    table = read(
        HEAD
        + EVERY
        + """
  - {role: qkv, shape: "*", choice: nvfp4, cost: 3}
  - {role: o, shape: "*", choice: nvfp4, cost: 3}
  - {role: o, shape: [64, 64], choice: nvfp4, cost: 5}
  - {role: "*", shape: [128, 64], choice: nvfp4, cost: 7}
  - {role: qkv, shape: "*", choice: nvfp4/mse, cost: 9}
"""
    )
    qkv, o = (f"model.layers.0.self_attn.{name}" for name in ("qkv", "o_proj"))
    assert table.of(qkv, NVFP4) == 3000
    assert table.of(qkv, Choice.parse("nvfp4/mse")) == 9000
    assert table.of(o, NVFP4) == 5000
    assert table.of("model.layers.0.mlp.experts", NVFP4) == 4 * 1500


def test_csv_says_the_same_as_yaml(read):
    settings = "# measured once\n# schema_version: 1\n# unit: microseconds a token\n# scale: 1000\n"
    rows = "*,*,*,nvfp4,1.5\n*,*,*,fp8,2\n*,*,*,bf16,4\nqkv,128,64,fp8,2.25\n"
    extra = "  - {role: qkv, shape: [128, 64], choice: fp8, cost: 2.25}\n"
    csv = read(f"{settings}role,n,k,choice,cost\n{rows}", "costs.csv")
    assert csv == read(HEAD + EVERY + extra)


def test_a_limit_of_a_table_is_exact(plan, read):
    table = read(HEAD + EVERY)
    choices = plan.options.choices
    fp8 = Assignment.of({name: FP8 if FP8 in own else BF16 for name, own in choices.items()})
    limit = Limit.of(table, table.number(fp8))
    assert limit.at_most == table.total(fp8)
    assert Limit.of(table, 12.3456).at_most == 12345


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (EVERY.replace("bf16", "nvfp4/mse"), "no row for .* in bf16: role .*, shape .*"),
        (EVERY.replace('"*", choice: fp8', "[1, 1], choice: fp8"), r"in fp8: .* \[128, 64\]"),
        (EVERY + EVERY, "rows.3: an earlier row gives the cost of role .*, shape .*, choice nvfp4"),
        (EVERY.replace("1.5", "1.0005"), "1.0005 is no whole number of steps of 1/1000"),
        (EVERY.replace("1.5", "-1"), "rows.0.cost: .*greater than or equal to 0"),
        (EVERY.replace("1.5", ".nan"), "rows.0.cost: .*finite number"),
        (EVERY.replace('role: "*"', "role: qvk"), "no role is called 'qvk'"),
        (EVERY.replace("nvfp4", "int4"), "'int4' is not a format"),
        (EVERY.replace("cost: 2", "price: 2"), "rows.1.cost: Field required"),
        ("", "rows: "),
    ],
)
def test_a_table_that_cannot_be_meant(read, rows, said):
    with pytest.raises(ConfigError, match=said):
        read(HEAD + rows)


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("[1, 2", "costs.yaml", "is not YAML"),
        ("- 1", "costs.yaml", "the table: "),
        ("role,choice,cost\n", "costs.csv", r"has the columns \['role', 'choice', 'cost'\]"),
        (
            "# unit: s\n# scale: 1\nrole,n,k,choice,cost\n*,*,*,fp8,1\n",
            "costs.csv",
            "schema_version",
        ),
    ],
)
def test_a_file_that_is_no_table(read, text, name, said):
    with pytest.raises(ConfigError, match=said):
        read(text, name)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (("unit: microseconds a token", 'unit: ""'), "unit: .*at least 1 character"),
        (("scale: 1000", "scale: 0"), "scale: .*greater than 0"),
        (("rows:\n", "rows: []\n"), "rows: .*at least 1 item"),
    ],
)
def test_settings_that_cannot_be_meant(read, changed, said):
    with pytest.raises(ConfigError, match=said):
        read(HEAD.replace(*changed))


def test_a_unit_of_one_letter_and_a_table_of_one_row_are_read(tmp_path):
    row = '  - {role: o, shape: "*", choice: fp8, cost: 3}\n'
    (tmp_path / "one.yaml").write_text(f"schema_version: 1\nunit: s\nscale: 1\nrows:\n{row}")
    table = TableFile.read(tmp_path / "one.yaml")
    assert (table.unit, len(table.rows)) == ("s", 1)


def test_a_file_that_is_not_there(plan, tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        CostTable.read(tmp_path / "none.yaml", plan.accounting)
