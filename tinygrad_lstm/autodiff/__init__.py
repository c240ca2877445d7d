"""Functions of functions: gradients, products with Jacobians, whole Jacobians, recomputation, checks."""

from tinygrad_lstm.autodiff.checkpoint import checkpoint
from tinygrad_lstm.autodiff.forward import jvp
from tinygrad_lstm.autodiff.gradcheck import gradcheck
from tinygrad_lstm.autodiff.matrices import hessian, hvp, jacobian
from tinygrad_lstm.autodiff.reverse import grad, value_and_grad, vjp

__all__ = ["checkpoint", "grad", "gradcheck", "hessian", "hvp", "jacobian", "jvp", "value_and_grad", "vjp"]
