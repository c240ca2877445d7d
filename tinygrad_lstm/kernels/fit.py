"""Derives the coefficients of :mod:`.fit_data`; run with ``python -m tinygrad_lstm.kernels.fit``.

Minimax approximation of the relative error by Lawson's iteratively reweighted least squares (C. L. Lawson,
1961), rationals linearised with the previous denominator (Sanathanan & Koerner, 1963), in double
precision, which leaves eight digits to spare for float32.  Not used at run time.
"""

from __future__ import annotations

import math

import numpy as np


def lawson(
    x: np.ndarray, f: np.ndarray, weight: np.ndarray, numerator: int, denominator: int, steps: int = 400
) -> tuple[list[float], list[float], float]:
    """P and Q (constant term first, Q(0) = 1) that minimise ``max |(P/Q - f) * weight|`` over points ``x``."""
    powers = np.vander(x, max(numerator, denominator) + 1, increasing=True)
    lawson_weight, q = np.ones_like(x), np.ones_like(x)
    best, kept = math.inf, np.zeros(numerator + denominator + 1)
    for _ in range(steps):
        matrix = np.hstack([powers[:, : numerator + 1], -f[:, None] * powers[:, 1 : denominator + 1]])
        scale = np.sqrt(lawson_weight) * weight / q
        scaled = matrix * scale[:, None]
        norms = np.linalg.norm(scaled, axis=0)
        solution = np.linalg.lstsq(scaled / norms, f * scale, rcond=None)[0] / norms
        p = powers[:, : numerator + 1] @ solution[: numerator + 1]
        q = 1.0 + powers[:, 1 : denominator + 1] @ solution[numerator + 1 :]
        error = np.abs((p / q - f) * weight)
        if error.max() < best:
            best, kept = float(error.max()), solution
        lawson_weight = lawson_weight * (error / error.max() + 1e-12) ** 0.7
        lawson_weight /= lawson_weight.sum()
    return list(kept[: numerator + 1]), [1.0, *kept[numerator + 1 :]], best


def chebyshev(low: float, high: float, count: int) -> np.ndarray:
    """Points that crowd at both ends, where a minimax error peaks."""
    return (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * np.linspace(0.0, 1.0, count))


def main() -> None:
    """Prints fit_data.py."""
    # erf(x) / x below 0.95, in x^2
    x = np.sqrt(chebyshev(1e-6, 0.95**2, 2000))
    ratio = np.array([math.erf(v) for v in x]) / x
    small, _, small_error = lawson(x * x, ratio, 1 / ratio, 5, 0)
    # -log(erfc(x)) from there on; an absolute error d of it is one of d erfc(x) in erf
    x = chebyshev(0.94, 4.0, 3000)
    complement = np.array([math.erfc(v) for v in x])
    large, _, large_error = lawson(x, -np.log(complement), complement / (1 - complement), 7, 0)
    # (e^r - 1 - r) / r^2; the series takes over where the difference would cancel
    r = chebyshev(-0.3466, 0.3466, 2000)
    rest = np.array([(math.expm1(v) - v) / v**2 if abs(v) > 1e-3 else 0.5 + v / 6 + v * v / 24 for v in r])
    exp, _, exp_error = lawson(r, rest, r * r, 4, 0)
    # (log(1 + f) - f + f^2/2) / f^3
    f = chebyshev(2**-0.5 - 1, 2**0.5 - 1, 3000)
    f = f[np.abs(f) > 1e-3]
    rest = (np.log1p(f) - f + f * f / 2) / f**3
    log, _, log_error = lawson(f, rest, np.abs(f**3 / np.log1p(f)), 7, 0)
    print('"""Coefficients for :mod:`.lowering`, constant term first; written by :mod:`.fit`."""\n')
    print("from __future__ import annotations\n")
    rows = {
        "ERF_SMALL": (small, small_error),
        "ERF_LARGE": (large, large_error),
        "EXP": (exp, exp_error),
        "LOG": (log, log_error),
    }
    for name, (coefficients, error) in rows.items():
        print(f"# relative error {error:.1e} (half an ulp of float32 is 6.0e-08)")
        print(f"{name} = (")
        for coefficient in coefficients:
            print(f"    {float(coefficient)!r},")
        print(")")


if __name__ == "__main__":
    main()
