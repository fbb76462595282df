"""Compiling in half the time, for tests that look at values and not at the compiled program."""

import functools

import jax

jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)
