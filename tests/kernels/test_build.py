"""The C++ library: built once, checked before it is loaded, done without where it cannot be."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import autoquant_kernels as ak
import pytest
import torch
from autoquant_kernels import build, cpu

ROOT = Path(build.__file__).parents[1]
SCRIPT = """
import logging; logging.basicConfig(format="%(message)s")
import torch, autoquant_kernels as ak
x = torch.arange(64.0).view(4, 16)
print(ak.active_backend(), float(ak.fake_quant_nvfp4(x, ak.nvfp4_global_scale(63.0)).sum()))
"""


needs_compiler = pytest.mark.skipif(not build.has_compiler(), reason="no C++ compiler")


def run(cache: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), **settings}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def first(cache: Path) -> subprocess.CompletedProcess[str]:
    """A first use, which compiles."""
    return run(cache)


@pytest.fixture(scope="module")
def compiled(cache: Path, first: subprocess.CompletedProcess[str]) -> Path:
    assert first.stdout.startswith("cpu-"), first.stderr
    (library,) = (cache / "autoquant").glob("*.so")
    return library


@pytest.fixture
def quick_compiler(compiled: Path, tmp_path: Path) -> str:
    """A compiler that has the library at once."""
    script = tmp_path / "cxx"
    copying = f"'-o' in sys.argv and shutil.copyfile({str(compiled)!r}, sys.argv[-1])"
    script.write_text(f"#!{sys.executable} -S\nimport shutil, sys\n{copying}\n")
    script.chmod(0o755)
    return str(script)


@needs_compiler
@pytest.mark.slow
def test_the_library_is_built_into_the_cache_once(
    cache: Path, first: subprocess.CompletedProcess[str], compiled: Path
) -> None:
    written = compiled.stat().st_mtime_ns
    assert run(cache).stdout == first.stdout
    assert compiled.stat().st_mtime_ns == written


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "edited", "foreign", "empty"])
def test_damage_is_noticed(tmp_path: Path, compiled: Path, damage: str) -> None:
    whole = compiled.read_bytes()
    assert build.is_intact(compiled)
    library = tmp_path / "fused.so"
    bad = {
        "cut": whole[: len(whole) // 2],
        "edited": whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
        "foreign": b"not a library",
        "empty": b"",
    }[damage]
    library.write_bytes(bad)
    assert not build.is_intact(library)


@needs_compiler
@pytest.mark.slow
def test_a_damaged_cache_is_mended(
    quick_compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", quick_compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = build.cached_library()
    library.parent.mkdir()
    library.write_bytes(b"\x7fELF damaged")
    done = run(tmp_path)
    assert done.stdout.startswith("cpu-"), done.stderr
    assert build.is_intact(library)


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="file permissions of POSIX")
def test_a_cache_that_cannot_be_written_costs_a_build_not_the_kernels(
    quick_compiler: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = run(tmp_path / "file", CXX=quick_compiler)
    assert done.stdout.startswith("cpu-"), done.stderr


@pytest.mark.slow
def test_without_a_compiler_pytorch_serves_with_one_line_in_the_log(tmp_path: Path) -> None:
    done = run(tmp_path, CXX="no-such-compiler")
    assert done.stdout.startswith("reference ")
    assert done.stderr.count("no C++ compiler (no-such-compiler)") == 1


def test_a_failing_compiler_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "cxx"
    script.write_text("#!/bin/sh\necho 'fused.cpp: too old' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(build.BuildError, match=r"fused.cpp: too old"):
        build.compile_library(tmp_path / "fused.so")
    assert not (tmp_path / "fused.so").exists()


def test_the_key_follows_compiler_and_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keys = set()
    for name in ("one", "two"):
        script = tmp_path / name
        script.write_text(f"#!/bin/sh\necho {name}\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        keys.add(build.cached_library())
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    keys.add(build.cached_library())
    assert len(keys) == 3


@pytest.mark.parametrize("name", ["fast", "cpu-sse9", "TRITON"])
def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("AUTOQUANT_KERNELS", name)
    with pytest.raises(ValueError, match=rf"AUTOQUANT_KERNELS={name}.*cpu-avx512bf16, triton"):
        ak.fake_quant_fp8(torch.ones(4), 1.0)


def test_a_cpu_backend_does_not_serve_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOQUANT_KERNELS", "cpu-scalar")
    with pytest.raises(ValueError, match="cannot serve a tensor on cuda"):
        ak.active_backend("cuda")


def test_each_backend_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = cpu.library()
    levels = () if compiled is None else cpu.LEVELS[: cpu.best_level(compiled) + 1]
    for name in ("reference", *levels):
        monkeypatch.setenv("AUTOQUANT_KERNELS", name)
        assert ak.active_backend() == name


@pytest.mark.slow
def test_import_builds_and_logs_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", "import autoquant_kernels"], env=environment, check=True)
    assert not list(tmp_path.iterdir())
    assert logging.getLogger("autoquant_kernels").handlers == []


def test_no_package_named_kernels() -> None:
    assert not (ROOT / "__init__.py").exists()
