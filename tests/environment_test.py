"""Preparing the process and describing it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import moelab
from moelab import environment

ROOT = Path(moelab.__file__).parent.parent


def python(code, **variables):
    """Runs code in a fresh process with few environment variables; returns what it printed."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SHOW = """
import jax
print(jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_entry_size_bytes,
      jax.config.jax_persistent_cache_min_compile_time_secs + 0.0)
"""


class TestPrepare:
    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("", "--xla_cpu_experimental_ynn_fusion_type="),
            ("--xla_x=1", "--xla_x=1 --xla_cpu_experimental_ynn_fusion_type="),
            (
                "--xla_cpu_experimental_ynn_fusion_type=dot",
                "--xla_cpu_experimental_ynn_fusion_type=dot",
            ),
        ],
    )
    def test_adds_the_flag_unless_it_is_there(self, before, after):
        code = (
            "import os; from moelab import environment as e; e.prepare(); e.prepare();"
            "print(os.environ['XLA_FLAGS'])"
        )
        assert python(code, XLA_FLAGS=before) == after

    @pytest.mark.parametrize("order", ["before", "after"])
    def test_turns_the_compilation_cache_on(self, order, tmp_path):
        first = "import jax\n" if order == "after" else ""
        code = f"{first}from moelab import environment as e; e.prepare()\n{SHOW}"
        assert python(code, MOELAB_CACHE=str(tmp_path)) == f"{tmp_path}/jax -1 0.0"

    def test_a_compiled_program_is_kept(self, tmp_path):
        code = "from moelab import environment as e; e.prepare(); import jax; jax.jit(lambda x: x + 1)(1.0)"
        python(code, MOELAB_CACHE=str(tmp_path))
        assert any((tmp_path / "jax").iterdir())

    def test_what_the_user_set_stays(self, tmp_path):
        code = f"from moelab import environment as e; e.prepare()\n{SHOW}"
        out = python(code, MOELAB_CACHE=str(tmp_path), JAX_COMPILATION_CACHE_DIR="/tmp/mine")
        assert out.startswith("/tmp/mine -1")

    def test_without_a_gpu_jax_does_not_complain_about_cuda(self):
        if Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists():
            pytest.skip("there is an NVIDIA driver here")
        code = (
            "import contextlib, io; from moelab import environment as e; e.prepare()\n"
            "said = io.StringIO()\n"
            "with contextlib.redirect_stderr(said):\n"
            "    import jax; jax.devices()\n"
            "print(repr(said.getvalue()))"
        )
        assert python(code, JAX_PLATFORMS="") == "''"

    def test_says_when_it_comes_too_late(self):
        code = (
            "import warnings, jax; jax.devices(); from moelab import environment as e\n"
            "with warnings.catch_warnings(record=True) as caught:\n"
            "    warnings.simplefilter('always'); e.prepare()\n"
            "print(*(w.message for w in caught))"
        )
        assert "JAX has started already" in python(code)
        assert python(code, XLA_FLAGS="--xla_cpu_experimental_ynn_fusion_type=") == ""


class TestDescribe:
    def test_has_what_the_card_wants(self):
        found = environment.describe()
        assert found["python"].startswith("3.12")
        assert found["cores"] == len(os.sched_getaffinity(0))
        assert found["packages"]["jax"] and found["packages"]["ml-collections"]
        assert found["cpu"]
        assert set(found["devices"]) == {"kind", "count"}
        assert {"enable_x64", "default_prng_impl", "threefry_partitionable"} <= set(found["jax"])

        # Cards are published: nothing in them says where on whose disk.
        assert str(ROOT) not in json.dumps(found)

    def test_git_follows_the_checkout(self, tmp_path):
        def git(*words):
            who = ["-c", "user.name=a", "-c", "user.email=a@b"]
            subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True)

        assert environment.git(tmp_path) is None  # no checkout
        git("init")
        (tmp_path / "a.txt").write_text("1")
        first = environment.git(tmp_path)
        assert first["commit"] is None and first["dirty"] and len(first["diff_sha256"]) == 64
        git("add", ".")
        git("commit", "-m", "a")
        clean = environment.git(tmp_path)
        assert len(clean["commit"]) == 40
        assert (clean["dirty"], clean["diff_sha256"]) == (False, None)
        (tmp_path / "a.txt").write_text("2")
        changed = environment.git(tmp_path)
        assert changed["commit"] == clean["commit"] and changed["dirty"]
        (tmp_path / "b.txt").write_text("new")
        assert environment.git(tmp_path)["diff_sha256"] != changed["diff_sha256"]
        (tmp_path / "sub").mkdir()
        assert environment.git(tmp_path / "sub") is None  # someone else's checkout


def test_simd_is_what_xla_may_use(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--a=1 --xla_cpu_max_isa=AVX2 --b=2")
    assert environment.simd() == "avx2"
    monkeypatch.delenv("XLA_FLAGS")
    flags = Path("/proc/cpuinfo").read_text().split()
    found = environment.simd()
    assert found in flags and ("avx512f" not in flags or found == "avx512f")
