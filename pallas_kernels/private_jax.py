"""Every use of private interfaces of JAX, Pallas and jax-triton, in one place, for the versions that it was read for.

Each function installs one patch, once, and says what it assumes and what stops working without it. On another version
of JAX all of them raise: the assumptions have to be read again first.
"""

from __future__ import annotations

import functools

import jax

VERSIONS = ("0.12.0", "0.12.0.1")


def once(install):
    """Decorates an installer: checks JAX's version, then runs it at most once per process."""

    @functools.wraps(install)
    def checked():
        if jax.__version__ not in VERSIONS:
            raise RuntimeError(
                f"{install.__name__} patches private interfaces of jax {' or '.join(VERSIONS)}, "
                f"but this is {jax.__version__}: read pallas_kernels/private_jax.py against it first"
            )
        install()

    return functools.cache(checked)
