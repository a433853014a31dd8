"""Sets up the process before JAX starts, and describes the machine and the software for a run's card."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path

# By default XLA:CPU hands reductions to a library that materialises their operand; an empty value keeps them fused.
CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
PACKAGES = (
    "moelab",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "ml-collections",
    "ml-dtypes",
    "grain",
    "tokenizers",
    "numpy",
    "scipy",
    "pyarrow",
)
_SIMD = ("avx512f", "avx2", "avx", "sse2", "sve2", "sve", "asimd")  # x86's, then ARM's
_NVIDIA_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # the second under WSL
_JAX_OPTIONS = (
    "jax_platforms",
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
)


def cache_directory() -> Path:
    """Returns where data and compiled programs are kept: $MOELAB_CACHE, or cache/ here."""
    return Path(os.environ.get("MOELAB_CACHE") or "cache").absolute()


def prepare() -> None:
    """Sets the CPU flag and the persistent compilation cache. Call it before jax starts; what is set already stays.

    Without an NVIDIA driver, JAX's CUDA plugin (which the extra `aot` installs) is told not to look for CUDA's
    libraries, since it prints a traceback for each one that it misses.

    Warns:
      RuntimeWarning: JAX has started without the flag, which can no longer be set.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if CPU_FLAG not in flags:
        if _backend_started():
            warnings.warn(
                f"JAX has started already, so {CPU_FLAG} is not set: call environment.prepare() before using jax",
                RuntimeWarning,
                stacklevel=2,
            )
        os.environ["XLA_FLAGS"] = f"{flags} {CPU_FLAG}=".strip()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not any(Path(driver).exists() for driver in _NVIDIA_DRIVERS):
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    options = {
        "jax_compilation_cache_dir": str(cache_directory() / "jax"),
        # Everything is worth keeping: a toolkit's programs are many and small.
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    chosen = {name: value for name, value in options.items() if name.upper() not in os.environ}
    os.environ.update({name.upper(): str(value) for name, value in chosen.items()})
    if "jax" in sys.modules:  # which has read its environment
        for name, value in chosen.items():
            sys.modules["jax"].config.update(name, value)


def _backend_started() -> bool:
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def describe() -> dict[str, object]:
    """Returns the code's commit, the packages, the machine and JAX's settings, as plain values. Starts JAX."""
    import jax

    return {
        "git": git(),
        "packages": packages(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "simd": simd(),
        "cores": len(os.sched_getaffinity(0)),
        "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "jax": {name.removeprefix("jax_"): getattr(jax.config, name) for name in _JAX_OPTIONS},
    }


def packages() -> dict[str, str]:
    """Returns the versions of what a result depends on; a package that is not installed is left out."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def cpu_model() -> str:
    """Returns the processor's name as its maker writes it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    names = (line.partition(":")[2] for line in text.splitlines() if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine()).strip()


def simd() -> str:
    """Returns the widest vector instructions that XLA may use: makers give kinds with and without them one name.

    The processor's, or what --xla_cpu_max_isa=AVX2 in XLA_FLAGS holds XLA to.
    """
    held = re.search(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    if held:
        return held[1].lower()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    flags = next(lines, "").partition(":")[2].split()
    return next((name for name in _SIMD if name in flags), "")


def git(folder: Path | None = None) -> dict[str, object] | None:
    """Returns the commit of the code, whether it was changed since, and a hash of the changes.

    Args:
      folder: root of the checkout; None: the one that moelab is run from.

    Returns:
      commit (None before the first one), dirty, diff_sha256 (of the diff and of new files; None if clean); or None
      where moelab does not come from a checkout, or git is missing.
    """
    folder = folder or Path(__file__).parent.parent
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or Path(top.decode().strip()).resolve() != folder.resolve():
        return None
    commit = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD")
    changed = _git(folder, "diff", "--binary", *(["HEAD"] if commit else ["--cached"])) or b""
    new = _git(folder, "ls-files", "--others", "--exclude-standard", "-z") or b""
    digest = hashlib.sha256(changed)
    for name in sorted(filter(None, new.split(b"\0"))):
        path = folder / os.fsdecode(name)
        if path.is_file():
            digest.update(name + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    dirty = bool(changed or new)
    return {
        "commit": commit.decode().strip() if commit else None,
        "dirty": dirty,
        "diff_sha256": digest.hexdigest() if dirty else None,
    }


def _git(folder: Path, *arguments: str) -> bytes | None:
    try:
        result = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
