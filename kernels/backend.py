"""Which form of an operation runs, and what Triton's interpreter needs.

`backend="auto"` takes the Triton kernels on CUDA and the torch reference elsewhere; "triton" and "torch" force one.
With TRITON_INTERPRET=1 in the environment before the first import, the kernels run on CPU tensors, one program after
the other in numpy: that is how the tests check them where there is no GPU.
"""

import os
from types import SimpleNamespace

from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # macOS, Windows: the references alone
    triton, tl, TensorDescriptor = None, SimpleNamespace(constexpr=float), None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
AUTO_DEVICES = {"cuda"}  # where `auto` takes Triton


def jit(function):
    """triton.jit where there is a Triton."""
    return function if triton is None else triton.jit(function)


def use_triton(backend: str, x: Tensor) -> bool:
    """Whether an operation on `x` runs as a Triton kernel. Raises ValueError where it cannot and was asked to."""
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', got {backend!r}")
    if backend == "torch" or (backend == "auto" and x.device.type not in AUTO_DEVICES):
        return False
    if triton is None:
        raise ValueError("the kernels need Triton, which is not installed: pip install triton, or backend='torch'")
    if x.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"Triton kernels need CUDA tensors, got one on {x.device} (for a test on CPU set "
                         "TRITON_INTERPRET=1 before the first import)")
    return True


@jit
def clamp(x, low, high):
    """x within [low, high]; NaN stays NaN, which Triton's own minimum and maximum would hide."""
    return tl.minimum(tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL), high, propagate_nan=tl.PropagateNan.ALL)
