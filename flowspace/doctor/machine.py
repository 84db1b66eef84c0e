"""What this machine can do for flowspace, in a second or two beside the import of torch.

Each line was tried, not looked up: an attention kernel by attention, a C++ compiler by compiling.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowspace import __version__
from flowspace.doctor.libraries import Library, extras, installed_version
from flowspace.errors import RunError

__all__ = ["Machine", "examine_machine"]

COMPILED_DERIVATIVES = (2, 11)
"""The first torch that lets a derivative be compiled with its model."""

COMPILERS = ("g++", "clang++", "c++", "cl")
"""By what names a C++ compiler is looked for, after that in the variable CXX."""

PROGRAM = "#include <Python.h>\n#include <cmath>\nint main() { return std::floor(0.5); }\n"
"""What torch.compile's kernels on the CPU include."""

COMPILE_SECONDS = 10.0
"""How long a compiler may take for three lines."""


@dataclass(frozen=True)
class Machine:
    """What was found.

    Attributes:
        versions: of flowspace, Python and the libraries that the core needs.
        system: the operating system and processor.
        device: what torch computes on.
        attention: the kernels of scaled_dot_product_attention that run on the device.
        compiling: whether torch.compile can build kernels, and why not.
        extras: for each extra the libraries that it brings.
        unknown: why extras are not known, or empty.
    """

    versions: dict[str, str]
    system: str
    device: str
    attention: list[str]
    compiling: str
    extras: dict[str, list[Library]] = field(default_factory=dict)
    unknown: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON: each library with whether it is ready."""
        found = asdict(self)
        for extra, libraries in self.extras.items():
            rows = [library._asdict() | {"ready": library.ready} for library in libraries]
            found["extras"][extra] = rows
        return found

    def missing_extras(self) -> list[str]:
        """Return the extras of which a library is missing or too old."""
        found = []
        for extra, libraries in self.extras.items():
            if not all(library.ready for library in libraries):
                found.append(extra)
        return found


def examine_machine() -> Machine:
    """Return what this machine can do."""
    versions = {"flowspace": __version__, "Python": platform.python_version()}
    for name in ("torch", "numpy", "sympy"):
        versions[name] = installed_version(name) or "not installed"
    versions["torch"] = str(torch.__version__)
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    machine = Machine(versions, system, _device(), _attention(), _compiling())
    try:
        return replace(machine, extras=extras())
    except RunError as error:
        return replace(machine, unknown=str(error))


def best_device() -> torch.device:
    """Return what torch computes on if it is asked for the fastest: CUDA, MPS, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _device() -> str:
    """Return the device in words, with the reason where there is no GPU."""
    device = best_device()
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} processors"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory / 2**30
        return f"{properties.name}, {memory:.0f} GiB, {torch.cuda.device_count()} in all"
    if device.type == "mps":
        return f"Apple GPU (MPS); {threads}"
    if torch.version.cuda is None:
        return f"CPU, {threads}; this torch is built without CUDA"
    return f"CPU, {threads}; torch is built for CUDA {torch.version.cuda}, and finds no GPU"


def _attention() -> list[str]:
    """Return the attention kernels that run on the device, in float32 or in bfloat16."""
    device, found = best_device(), []
    for backend in SDPBackend.__members__.values():
        if backend.name in ("ERROR", "OVERRIDEABLE"):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            if _runs(backend, device, dtype):
                found.append(backend.name.removesuffix("_ATTENTION").lower())
                break
    return found


def _runs(backend: SDPBackend, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether an attention kernel takes 16 tokens of two heads."""
    tokens = torch.zeros(1, 2, 16, 16, device=device, dtype=dtype)
    try:
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of why a kernel does not fit
            F.scaled_dot_product_attention(tokens, tokens, tokens)
    except RuntimeError:
        return False
    return True


def _compiling() -> str:
    """Return whether torch.compile works here: on a GPU by Triton, on a CPU by a C++ compiler."""
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    followed = "derivatives run compiled"
    if release < COMPILED_DERIVATIVES:
        followed = "derivatives run as written; from torch 2.11 on they run compiled"
    if best_device().type == "cuda":
        triton = installed_version("triton")
        if triton is None:
            return "no: Triton is missing; write: pip install triton"
        return f"yes, by Triton {triton}; {followed}"
    compiler, reason = _compiler()
    if reason:
        return f"no: {reason}"
    return f"yes, by {compiler}; {followed}"


def _compiler() -> tuple[str, str]:
    """Return a C++ compiler, and why it cannot be used; no reason if it can."""
    places = map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))
    path = next(filter(None, places), None)
    if path is None:
        return "", "no C++ compiler is found; install g++ (or clang++), or set CXX"
    headers = sysconfig.get_paths()["include"]
    if not Path(headers, "Python.h").exists():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        return path, f"Python's headers are not in {headers}; install {package}"
    if Path(path).stem.lower() == "cl":  # its arguments are others; being there is enough
        return path, ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "program.cpp")
        source.write_text(PROGRAM)
        command = [path, "-fsyntax-only", f"-I{headers}", str(source)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return path, f"{path} does not run ({type(error).__name__})"
    if done.returncode:
        said = next(iter(done.stderr.splitlines()), "nothing")
        return path, f"{path} does not compile three lines; it says: {said}"
    return path, ""
