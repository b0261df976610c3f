"""The update rules in Triton, on one block of a parameter: the rules of the reference that have a kernel."""

import triton
import triton.language as tl

from ncollapse.kernels.update.reference import declared
from ncollapse.kernels.update.table import MIXED as _MIXED

# The numbers of the rules in the table.
SGD, SIGNUM, ADAM, LION = (tl.constexpr(declared(rule).kernel) for rule in ("sgd", "signum", "adam", "lion"))
MIXED = tl.constexpr(_MIXED)


@triton.jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))  # NaN stays NaN


@triton.jit
def _sqrt(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def divide(x, y):
    """x / y, rounded to nearest."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


# A rule takes the gradient plus the coupled decay, the states, β₁, 1 − β₁, β₂, 1 − β₂, (1 − β₂ᵗ)^−½, ε and 1 − τ, and
# returns the direction and the new states. To add a kernel for a rule, add it here, in `direction`, in _cpu.cpp (in
# `layout` too) and give its declaration in `RULES` a number.
@triton.jit
def _sgd(g, v, b1, damp, nesterov):
    v = v * b1 + g * damp
    return tl.where(nesterov, g + v * b1, v), v


@triton.jit
def _signum(g, v, b1):
    v = v * b1 + g
    return _sign(v), v


@triton.jit
def _adam(g, m, v, b1c, b2, b2c, root, eps):
    m = m + (g - m) * b1c
    v = v * b2 + g * g * b2c
    return divide(m, _sqrt(v) * root + eps), m, v


@triton.jit
def _lion(g, m, b1, b1c, b2, b2c):
    return _sign(m * b1 + g * b1c), m * b2 + g * b2c


@triton.jit
def direction(rule, g, m, v, b1, b1c, b2, b2c, root, eps, damp, nesterov, RULE: tl.constexpr):
    """The direction and the new states of a block, all `[BLOCK]`, from g and the states m and v.

    Args:
        rule: the rule's number; if all rows have one rule, the constant RULE, so that only its branch is compiled.
        RULE: the rule of all rows, or MIXED; an unknown one is an error when compiling. (Rows of a rule without a
            kernel never reach the table: `launch` hands their parameters to the reference.)
    """
    tl.static_assert(
        (RULE == SGD) | (RULE == SIGNUM) | (RULE == ADAM) | (RULE == LION) | (RULE == MIXED),
        "the update kernel does not know this rule",
    )
    if rule == SGD:
        u, m = _sgd(g, m, b1, damp, nesterov)
    elif rule == SIGNUM:
        u, m = _signum(g, m, b1)
    elif rule == ADAM:
        u, m, v = _adam(g, m, v, b1c, b2, b2c, root, eps)
    else:
        u, m = _lion(g, m, b1, b1c, b2, b2c)
    return u, m, v
