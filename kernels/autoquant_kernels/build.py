"""Compiles the C++ kernels: into a wheel, or at first use into the user's cache.

A library carries the SHA-256 of its own bytes behind its end, where the loader of the operating
system does not look: a file that was cut short, edited or put there by something else fails the
check and is built again, never loaded. This module imports nothing but the standard library, so
that a wheel can be built without torch.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "cpp" / "fused.cpp"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared", "-w")
SECONDS = 300
DIGEST_BYTES = 32


class BuildError(Exception):
    """No compiler, or the compiler did not produce a library; the message says which."""


def source_key() -> str:
    """Hexadecimal digest of the C++ sources."""
    digest = hashlib.sha256()
    for path in sorted((SOURCE, *SOURCE.parent.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def shipped_library() -> Path:
    """Where a wheel keeps the library that was built from these very sources."""
    return FOLDER / f"fused-{source_key()}.so"


def cache_folder() -> Path:
    """The user's cache, `$XDG_CACHE_HOME/autoquant` or `~/.cache/autoquant`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "autoquant"


def cached_library() -> Path:
    """Where the cache keeps the library of these sources, this compiler and these flags.

    Raises:
        BuildError: no compiler.
    """
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, check=False).stdout
    identity = "\0".join((source_key(), *command, *FLAGS)).encode() + version
    return cache_folder() / f"fused-{hashlib.sha256(identity).hexdigest()[:32]}.so"


def compiler() -> list[str]:
    """The C++ compiler's command: `$CXX`, else the first of c++, g++, clang++ on the path.

    Raises:
        BuildError: none of them is there.
    """
    command = shlex.split(os.environ.get("CXX", ""))
    if command and shutil.which(command[0]):
        return command
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if found is None or command:
        raise BuildError(f"no C++ compiler ({' '.join(command) or 'c++, g++, clang++'})")
    return [found]


def has_compiler() -> bool:
    """Whether the kernels can be compiled here."""
    try:
        return bool(compiler())
    except BuildError:
        return False


def is_intact(library: Path) -> bool:
    """Whether `library` is a file of this user that still has the bytes the build gave it."""
    try:
        data = library.read_bytes()
        owner = library.stat().st_uid
    except OSError:
        return False
    body, digest = data[:-DIGEST_BYTES], data[-DIGEST_BYTES:]
    return owner in (0, os.getuid()) and hashlib.sha256(body).digest() == digest


def compile_library(library: Path) -> None:
    """Compile into `library`, which appears whole or not at all.

    Raises:
        BuildError: no compiler, or it failed; the message holds its last line.
        OSError: the folder cannot be written.
    """
    if sys.platform == "win32":
        raise BuildError("the C++ kernels are not built on Windows")
    command = compiler()
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        _run([*command, *FLAGS, str(SOURCE), "-o", str(built)])
        with built.open("r+b") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
        built.replace(library)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise BuildError(f"{command[0]} failed: {lines[-1]}")
