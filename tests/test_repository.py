"""What holds of the repository as a whole."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path
from statistics import median

import pytest
import yaml
from tracked import ROOT, tracked_files

import autoquant
from autoquant.formats import BF16, all_formats

LONGEST_FILE = 450
MEDIAN_FILE = 130
FILES_OF_A_PACKAGE = 16
LINES_OF_A_PACKAGE = 2500

CODE = {".py", ".cpp", ".h", ".sh", ".js"}

SLOW_IMPORTS = (
    "torch",
    "transformers",
    "optuna",
    "mlflow",
    "scipy",
    "matplotlib",
    "numpy",
    "rich",
    "datasets",
)

HELP = "from autoquant.cli import cli; cli.main(['--help'], standalone_mode=False)"

CONFIGURED = (*SLOW_IMPORTS, "pydantic")
"""What is slow where no settings are read. Help shows settings, whose types come from pydantic: it
adds 0.15 s to the 0.05 s of `autoquant --help`, where torch would add one to two seconds."""


def text_of(path: Path) -> str:
    """Text of a text file, and nothing of any other."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_no_module_is_called_kernels():
    """Transformers imports a package of that name if it finds one."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels.py").exists()


def test_no_file_of_code_is_too_long_to_hold_in_the_head():
    lengths = {
        path.relative_to(ROOT).as_posix(): len(text_of(path).splitlines())
        for path in tracked_files()
        if path.suffix in CODE
    }
    assert {name: n for name, n in lengths.items() if n > LONGEST_FILE} == {}


def test_no_package_is_too_large_to_hold_in_the_head():
    packages = defaultdict(list)
    for path in tracked_files():
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".py" and name.startswith(("autoquant/", "kernels/autoquant_kernels/")):
            packages[path.parent].append(len(text_of(path).splitlines()))
    files = [lines for package in packages.values() for lines in package]
    assert len(files) > 100
    assert median(files) <= MEDIAN_FILE
    for folder, package in packages.items():
        assert len(package) <= FILES_OF_A_PACKAGE, folder
        assert sum(package) <= LINES_OF_A_PACKAGE, folder


def test_no_file_names_a_path_of_one_machine():
    pattern = re.compile(r"(?<![\w./~-])/(?:work|root|opt|home|Users)/\w")
    found = {
        f"{path.relative_to(ROOT).as_posix()}:{number}"
        for path in tracked_files()
        if path.name != Path(__file__).name
        for number, line in enumerate(text_of(path).splitlines(), start=1)
        if pattern.search(line)
    }
    assert found == set()


@pytest.mark.parametrize(
    ("code", "slow"),
    [
        ("import autoquant", CONFIGURED),
        ("import autoquant.errors, autoquant.formats, autoquant.plan.assignment", CONFIGURED),
        ("import autoquant.store.run_directory", CONFIGURED),
        (
            "from autoquant.cli import cli; cli.main(['--version'], standalone_mode=False)",
            CONFIGURED,
        ),
        ("import autoquant.run.config", SLOW_IMPORTS),
        (
            "from autoquant.cli import cli; cli.main(['--help'], standalone_mode=False)",
            SLOW_IMPORTS,
        ),
    ],
)
def test_light_imports_stay_light(code, slow):
    report = f"{code}\nimport sys; print('\\n', *(set({slow!r}) & sys.modules.keys()))"
    assert run_python(report).splitlines()[-1].split() == []


def test_the_help_of_every_command_stays_light():
    code = (
        "import sys, click\n"
        "from autoquant.cli import MODULES, cli\n"
        "for name in MODULES: cli.main([name, '--help'], standalone_mode=False)\n"
        f"print('\\n', *(set({SLOW_IMPORTS!r}) & sys.modules.keys()))"
    )
    assert run_python(code).splitlines()[-1].split() == []


def test_the_module_runs_as_the_console_script_does():
    done = subprocess.run(
        [sys.executable, "-m", "autoquant", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == f"autoquant, version {autoquant.__version__}\n"


def test_the_changelog_knows_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{autoquant.__version__}]" in changelog
    assert f"version: {autoquant.__version__}" in (ROOT / "CITATION.cff").read_text("utf-8")


def test_every_direct_dependency_is_pinned_for_repeatable_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(name for extra in extras.values() for name in extra)]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {line.partition("==")[0] for line in constraints.splitlines() if "==" in line}
    assert {re.match(r"[\w-]+", name)[0] for name in wanted} - pinned == set()


def test_the_workflow_runs_what_a_change_must_pass_on_every_supported_python():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    (job,) = workflow["jobs"].values()
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    supported = [
        name.rpartition(" :: ")[2]
        for name in project["classifiers"]
        if re.match(r"Programming Language :: Python :: 3\.\d+$", name)
    ]
    assert job["strategy"]["matrix"]["python"] == supported


def test_formats_are_named_in_their_own_files_alone():
    """Elsewhere a format is an object of the registry; BF16, which is no quantization, aside."""
    names = {str(f): f.label for f in all_formats() if f != BF16.format}
    words = re.compile(r"\b(" + "|".join(map(re.escape, (*names, *names.values()))) + r")\b")
    package = ROOT / "autoquant"
    # What sources call their own formats is no format of ours.
    allowed = ("formats/", "export/layouts/", "report/style.py", "source/")
    found = set()
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package).as_posix()
        if not place.startswith(allowed):
            found |= {f"{place}: {word}" for word in code_words(path) if words.search(word)}
    assert found == set()


def code_words(path: Path) -> set[str]:
    """Names and strings of a file's code; docstrings, and what people read, are not code."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {
        id(node.value) for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }  # fmt: skip
    words = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, ast.alias):
            words.add(node.name)
        elif isinstance(node, ast.Constant) and id(node) not in prose:
            words |= (
                {node.value} if isinstance(node.value, str) and " " not in node.value else set()
            )
    return words
