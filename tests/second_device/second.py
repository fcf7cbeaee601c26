"""A simulated GPU: `second.cpp`, compiled and made known to torch as the device "second"."""

import subprocess
import types
from contextlib import nullcontext
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("second.cpp")


def build(folder):
    """Compiles the device. Returns the library."""
    library, root = Path(folder) / "second_device.so", Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    options = ["-shared", "-fPIC", "-O0", "-std=c++20", abi, f"-I{root / 'include'}", f"-L{root / 'lib'}"]
    command = ["g++", *options, str(SOURCE), "-o", str(library), "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    return library


def load(library):
    """Makes the device known to torch, for the rest of the process and before its first backward pass."""
    torch.ops.load_library(str(library))
    torch.utils.rename_privateuse1_backend("second")
    module = types.ModuleType("torch.second")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module.manual_seed_all = lambda seed: None  # it draws from the CPU's generator
    module.get_rng_state = lambda device=None: torch.empty(0, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=None: None
    module.device = lambda device: nullcontext()
    torch._register_device_module("second", module)
    torch.utils.generate_methods_for_privateuse1_backend()


def called():
    """The operations of torch that have run on the device."""
    return torch.ops.second.called()
