"""What users install: the source distribution and its wheels, with a compiler and without.

Both are installed into an environment of their own. Dependencies come from the environment of the
tests, whose other packages the new one sees and whose checkout it does not.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

import pytest
from autoquant_kernels import build
from searchable import TOKEN_FLAGS, save_searchable, save_text
from tracked import ROOT, tracked_files

import autoquant

pytestmark = pytest.mark.slow

NO_COMPILER = {"CXX": "no-such-compiler"}
REFERENCE = {"AUTOQUANT_KERNELS": "reference"}

SHIPPED = {
    "autoquant/": "autoquant/",
    "search_spaces/": "autoquant/search_spaces/",
    "kernels/autoquant_kernels/": "autoquant_kernels/",
}
"""Folders of the repository, and where a wheel has them."""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, made of a checkout without anything that was built in it."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    for path in tracked_files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return made("--sdist", source, folder)


def made(what: str, source: Path, folder: Path, **settings: str) -> Path:
    """The distribution that `python -m build` makes of an unpacked source."""
    subprocess.run(
        [sys.executable, "-m", "build", what, "--outdir", folder, source],
        env={**os.environ, **settings},
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.tar.gz" if what == "--sdist" else "*.whl")
    return built


@pytest.fixture(scope="module", params=["with a compiler", "without one"])
def wheel(request, sdist, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the source distribution."""
    has_compiler = request.param == "with a compiler"
    if has_compiler and not build.has_compiler():
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = folder / sdist.name.removesuffix(".tar.gz")
    return made("--wheel", source, folder, **({} if has_compiler else NO_COMPILER))


def is_compiled(wheel: Path) -> bool:
    return not wheel.name.endswith("-py3-none-any.whl")


def test_a_wheel_holds_every_module_and_data_file_and_nothing_else(wheel):
    expected = {
        package + name.removeprefix(folder)
        for path in tracked_files()
        for name in [path.relative_to(ROOT).as_posix()]
        for folder, package in SHIPPED.items()
        if name.startswith(folder)
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    built = {f"autoquant_kernels/{build.shipped_library().name}"} if is_compiled(wheel) else set()
    assert held == expected | built


def test_a_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    said = HeaderParser().parsestr(archive.read(name).decode("utf-8"))
    assert (said["Name"], said["Version"]) == ("autoquant", autoquant.__version__)
    assert said["Author"] == "The AutoQuant authors"
    assert said["License-Expression"] == "Apache-2.0"
    assert said.get_payload().startswith("# AutoQuant\n")


def test_a_source_distribution_holds_every_file_of_the_repository(sdist):
    root = sdist.name.removesuffix(".tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.removeprefix(f"{root}/") for name in archive.getnames()}
    assert {path.relative_to(ROOT).as_posix() for path in tracked_files()} - held == set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """An environment that a wheel is installed in."""

    folder: Path
    is_compiled: bool

    def run(self, *arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
        """The console script, where no compiler is and nothing was built before."""
        return subprocess.run(
            [self.folder / "bin" / "autoquant", *map(str, arguments)],
            cwd=self.folder,
            env={
                **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
                **NO_COMPILER,
                "XDG_CACHE_HOME": str(self.folder / "cache"),
                "AUTOQUANT_CACHE": str(self.folder / "cache"),
                **settings,
            },
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    names = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", vars=names))
    dependencies = [place for place in sys.path if place.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join([*dependencies, ""]))
    command = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install"]
    subprocess.run(
        [*command, "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel],
        check=True,
        capture_output=True,
    )
    assert (site / "autoquant" / "__init__.py").is_file()
    return Installed(folder=folder, is_compiled=is_compiled(wheel))


def test_an_installed_wheel_has_its_kernels_or_says_that_it_has_none(installed):
    done = installed.run("env", "--format", "json")
    assert done.returncode == 0, done.stderr
    backend = json.loads(done.stdout)["kernels"]["cpu"]
    if installed.is_compiled:
        assert (backend[:4], done.stderr) == ("cpu-", "")
    else:
        assert backend == "reference"
        assert done.stderr == (
            "warning: C++ kernels are not available (no C++ compiler (no-such-compiler)); "
            "plain PyTorch is used, slower.\n"
        )


def test_an_installed_wheel_searches_verifies_and_its_kernels_agree(installed, tmp_path):
    model = save_searchable("qwen3_moe", tmp_path / "model", num_hidden_layers=1)
    text = save_text(tmp_path / "text")
    run = tmp_path / "run"
    done = installed.run(
        *("search", model, "--budget-bpe", "12", "--trials", "2", "--calibration", text),
        *("--out", run, "--no-mlflow", "--format", "json", *TOKEN_FLAGS),
    )
    assert done.returncode == 0, done.stderr
    verified = installed.run("verify", run / "checkpoint", "--source", model)
    assert verified.returncode == 0, verified.stderr
    if installed.is_compiled:  # else both are the reference
        tokens = ("--calibration", text, *TOKEN_FLAGS, "--format", "json")
        checkpoint = ("--checkpoint", run / "checkpoint")
        scored = installed.run("score", model, *checkpoint, *tokens, **REFERENCE)
        assert scored.returncode == 0, scored.stderr
        measured = json.loads(scored.stdout)["kl"]
        assert measured == pytest.approx(json.loads(done.stdout)["kl"], rel=1e-4)
