"""What the compiler makes of the kernels for sm_90 (H100, H200), without a GPU: a row of JSON a kernel. It changes
Triton's driver and the kernels' modules for good, so test_bench.py runs it as a program of its own."""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).parents[1]))


class SM90:
    """All that Triton asks of a driver before it compiles. There is no device behind it."""

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Compiled:
    """In a kernel's place: a launch compiles it for exactly the arguments of the launch, notes it, and runs nothing."""

    def __init__(self, kernel, found: list):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return lambda *args, **options: self.found.append(self.kernel.warmup(*args, grid=grid, **options))


def code_of(kernel) -> dict:
    """What the machine code needs, by the tool that comes with Triton, and what the assembly contains."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {"kernel": kernel.metadata.name, "registers": int(registers), "stack bytes": int(stack),
            "shared KiB": kernel.metadata.shared / 1024, "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"),
            "TMA loads": kernel.asm["ptx"].count("cp.async.bulk.tensor.2d.shared")}


def main() -> None:
    """linear_logprob in bf16, then group_advantage, with the divisibilities of training shapes."""
    triton.runtime.driver.set_active(SM90())
    linear, advantage = (importlib.import_module(f"kernels.{name}") for name in ("linear_logprob", "group_advantage"))
    found: list = []
    for module in (linear, advantage):
        for key, kernel in list(vars(module).items()):
            if key.endswith("_kernel") and isinstance(kernel, triton.JITFunction):
                setattr(module, key, Compiled(kernel, found))
    # The calls go in below the check that the tensors are on a GPU: small ones on the CPU stand for large ones there.
    T, V, D = 128, 4096, 256
    row, targets, offsets = torch.ones(T), torch.zeros(T, dtype=torch.long), torch.tensor([0, 64, T])
    operands = torch.zeros(T, D, dtype=torch.bfloat16), torch.zeros(V, D, dtype=torch.bfloat16), targets
    for entropy in (False, True):
        linear._forward(*operands, 1.0, entropy, True)
    linear._backward(row, *operands, row, 1.0, True, True)
    advantage._launch(row.double(), offsets, row[:2].double(), 1e-6, 5.0)
    for kernel in {k.hash: k for k in found}.values():  # slices launch the same ones again
        print(json.dumps(code_of(kernel)))


if __name__ == "__main__":
    main()
