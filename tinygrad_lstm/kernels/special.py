"""NumPy implementations of the scalar functions that NumPy does not have: sigmoid, softplus, erf.

Each takes arrays or numbers of any shape, returns float32 for float32 and float64 for float64 and for
integers, and stays silent (no overflow, no invalid value) for every input, infinities included.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["erf", "sigmoid", "softplus"]


def _floating(x: Any) -> Any:
    """``x`` as an array (or NumPy scalar) of a floating dtype; integers and bools become float64."""
    if isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind == "f":
        return x
    array = np.asarray(x)
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))``, shape and dtype of ``x``; relative precision is kept on both sides.

    With ``e = exp(-|x|)`` the value is ``1 / (1 + e)`` for x >= 0 and ``e / (1 + e)`` below: the exponential
    never overflows.
    """
    x = _floating(x)
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1.0)[()] / (1.0 + e)


def softplus(x: Any) -> Any:
    """``log(1 + exp(x))`` as ``max(x, 0) + log1p(exp(-|x|))``, shape and dtype of ``x``."""
    x = _floating(x)
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


# Rational approximations of erf from FreeBSD's s_erf.c (fdlibm).
# ====================================================
# Copyright (C) 1993 by Sun Microsystems, Inc. All rights reserved.
# Developed at SunPro, a Sun Microsystems, Inc. business.
# Permission to use, copy, modify, and distribute this software is freely granted, provided that this
# notice is preserved.
# ====================================================
# Coefficients from the highest power to the lowest.
_ERX = 8.45062911510467529297e-01
_EFX = 1.28379167095512586316e-01
_PP = (
    -2.37630166566501626084e-05,
    -5.77027029648944159157e-03,
    -2.84817495755985104766e-02,
    -3.25042107247001499370e-01,
    1.28379167095512558561e-01,
)
_QQ = (
    -3.96022827877536812320e-06,
    1.32494738004321644526e-04,
    5.08130628187576562776e-03,
    6.50222499887672944485e-02,
    3.97917223959155352819e-01,
    1.0,
)
_PA = (
    -2.16637559486879084300e-03,
    3.54783043256182359371e-02,
    -1.10894694282396677476e-01,
    3.18346619901161753674e-01,
    -3.72207876035701323847e-01,
    4.14856118683748331666e-01,
    -2.36211856075265944077e-03,
)
_QA = (
    1.19844998467991074170e-02,
    1.36370839120290507362e-02,
    1.26171219808761642112e-01,
    7.18286544141962662868e-02,
    5.40397917702171048937e-01,
    1.06420880400844228286e-01,
    1.0,
)
_RA = (
    -9.81432934416914548592e00,
    -8.12874355063065934246e01,
    -1.84605092906711035994e02,
    -1.62396669462573470355e02,
    -6.23753324503260060396e01,
    -1.05586262253232909814e01,
    -6.93858572707181764372e-01,
    -9.86494403484714822705e-03,
)
_SA = (
    -6.04244152148580987438e-02,
    6.57024977031928170135e00,
    1.08635005541779435134e02,
    4.29008140027567833386e02,
    6.45387271733267880336e02,
    4.34565877475229228821e02,
    1.37657754143519042600e02,
    1.96512716674392571292e01,
    1.0,
)
_RB = (
    -4.83519191608651397019e02,
    -1.02509513161107724954e03,
    -6.37566443368389627722e02,
    -1.60636384855821916062e02,
    -1.77579549177547519889e01,
    -7.99283237680523006574e-01,
    -9.86494292470009928597e-03,
)
_SB = (
    -2.24409524465858183362e01,
    4.74528541206955367215e02,
    2.55305040643316442583e03,
    3.19985821950859553908e03,
    1.53672958608443695994e03,
    3.25792512996573918826e02,
    3.03380607434824582924e01,
    1.0,
)


def _polynomial(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    """Horner's scheme, coefficients from the highest power down."""
    result = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result *= x
        result += coefficient
    return result


def _erf_tail(x: np.ndarray, numerator: tuple[float, ...], denominator: tuple[float, ...]) -> np.ndarray:
    """``1 - erfc(x)`` for positive x >= 1.25."""
    s = 1.0 / (x * x)
    ratio = _polynomial(numerator, s) / _polynomial(denominator, s)
    # x with its low half cleared: its square is exact, so exp(-x^2) keeps full relative precision.
    z = (x.view(np.int64) & np.int64(-(1 << 32))).view(np.float64)
    return 1.0 - np.exp(-z * z - 0.5625) * np.exp((z - x) * (z + x) + ratio) / x


def erf(x: Any) -> Any:
    """The error function; shape and dtype of ``x``.

    float64: below 1 ulp (rational approximations of fdlibm).  Other floating dtypes are computed in
    float64 and rounded once.  NaN stays NaN, erf(-0) is -0, erf(+-inf) is +-1.
    """
    x = _floating(x)
    values = np.ascontiguousarray(x, dtype=np.float64).ravel()
    a = np.abs(values)
    result = np.ones_like(values)
    part = ~(a >= 0.84375)  # NaN goes through the polynomial and stays NaN
    if part.any():
        v = values[part]
        z = v * v
        result[part] = v + v * (_polynomial(_PP, z) / _polynomial(_QQ, z))
    large = ~part
    if large.any():
        part = large & (a < 1.25)
        s = a[part] - 1.0
        result[part] = _ERX + _polynomial(_PA, s) / _polynomial(_QA, s)
        part = (a >= 1.25) & (a < 1.0 / 0.35)
        result[part] = _erf_tail(a[part], _RA, _SA)
        part = (a >= 1.0 / 0.35) & (a < 6.0)
        result[part] = _erf_tail(a[part], _RB, _SB)
        np.copysign(result, values, out=result, where=large)
    return result.astype(x.dtype, copy=False).reshape(x.shape)[()]
