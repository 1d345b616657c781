"""What the compiler makes of every registered kernel, on targets that this machine need not have; and this machine.

    compile_kernels(["sm_90"])  ->  [{"op", "kernel", "config", "target", "registers", "spill_bytes", "shared_bytes",
                                      "instructions": {name: count}}, …]

Each `Launch` of the registry is compiled for each target by the real Triton compiler, with the attributes that an
aligned launch specialises on (without `tt.divisibility` loads are 16 bits wide and the register count is another
kernel's). The numbers come from the machine code: `cuobjdump` and `nvdisasm`, which the triton wheel brings, and the
metadata of AMD's assembly. Results are kept in `~/.cache/tritium` (or `TRITIUM_CACHE`) by the hash of the source.

`python -m tritium.kernels.doctor` is the process that compiles: one of its own, because a process that has kernels
under the interpreter can't. `spill_bytes` is the stack of a thread, where spilled registers live.
"""

import collections
import hashlib
import json
import multiprocessing
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

import torch

from tritium.kernels import all_ops
from tritium.kernels.backend import CHOICES, HAS_TRITON, TARGETS, Target
from tritium.kernels.registry import Launch

# Matrix instructions, and accesses to global and local memory with their width. In SASS after the address, since the
# listing holds data too; perhaps with a predicate.
_SASS = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?((?:[A-Z]+MMA|LDG|STG|LDL|STL|LDGSTS|ATOMG|RED)(?:\.\w+)*)\b", re.M
)
_AMDGCN = re.compile(
    r"^\s*((?:v_mfma|global_load|global_store|buffer_load|buffer_store|scratch|global_atomic)_\w+)", re.M
)


def compile_kernels(targets: Iterable[str] = tuple(TARGETS), ops: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Compile every kernel (of `ops`, or of all) for each target, in a process of its own; rows as in the docstring.

    A kernel that does not compile has an "error" instead of numbers.
    Raises: RuntimeError with the compiling process's words if it fails as a whole.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", __spec__.name, json.dumps({"targets": list(targets), "ops": list(ops)})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the doctor's compiling process failed:\n{done.stderr}")
    return json.loads(done.stdout)


# Bytes a thread; every other kernel: none. _decode: by Triton 3.6, with heads of 256 and a softcap; by 3.7 none.
SPILL_LIMIT = {"_attention_dq": 256, "_attention_dkv": 256, "_decode": 8}


def problems(rows: Iterable[dict[str, Any]]) -> list[str]:
    """One sentence for each kernel that does not compile, spills, or needs more shared memory than its target has."""
    found = []
    for row in rows:
        name = f"{row['op']}: {row['kernel']} {row['config']} on {row['target']}"
        limit, spills = TARGETS[row["target"]].shared_bytes, SPILL_LIMIT.get(row["kernel"], 0)
        if "error" in row:
            found.append(f"{name} does not compile: {row['error']}")
            continue
        if row["shared_bytes"] > limit:
            found.append(f"{name} needs {row['shared_bytes']} bytes of shared memory; a block there has {limit}")
        if row["spill_bytes"] > spills:
            found.append(f"{name} spills {row['spill_bytes']} bytes; {spills} are allowed")
    return found


def machine() -> dict[str, Any]:
    """What this machine has, and which backend each op uses here, and why."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in ("tritium", "torch", "triton", "nvidia-ml-py")},
        "cpu": cpu(),
        "gpu": _gpus(),
        "backends": dict.fromkeys(sorted(all_ops()), _backend()),
    }


def version_of(package: str) -> str | None:
    """Of an installed package, else None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """Its model, cores, torch's threads, and instructions for bf16."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", cpuinfo.read_text(), re.M)) if cpuinfo.exists() else {}
    flags = set(fields.get("flags", "").split())
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "fast_bf16": sorted(flags & {"avx512_bf16", "amx_bf16"}),
    }


def _gpus() -> list[dict[str, Any]] | str:
    """What NVML knows of each NVIDIA GPU, what torch knows of an AMD one, or the reason why there is nothing to say."""
    if torch.version.hip and torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [{"name": p.name, "target": p.gcnArchName, "memory_bytes": p.total_memory} for p in properties]
    try:
        import pynvml

        pynvml.nvmlInit()
    except (ImportError, OSError) as error:
        return f"none: nvidia-ml-py can't be used ({error})"
    except pynvml.NVMLError as error:
        return f"none: {error}"
    try:
        versions = {"driver": pynvml.nvmlSystemGetDriverVersion(), "nvml": pynvml.nvmlSystemGetNVMLVersion()}
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [
            {
                "name": pynvml.nvmlDeviceGetName(handle),
                "target": "sm_{}{}".format(*pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
                "memory_bytes": pynvml.nvmlDeviceGetMemoryInfo(handle).total,
            }
            | versions
            for handle in handles
        ]
    finally:
        pynvml.nvmlShutdown()


def _backend() -> str:
    """The backend and the reason, as `backend.use_triton` decides for tensors on this machine's best device."""
    choice = os.environ.get("TRITIUM_BACKEND", "auto")
    if choice not in CHOICES:
        return f"none: TRITIUM_BACKEND={choice!r} is not one of {', '.join(CHOICES)}"
    if choice == "torch":
        return "torch: TRITIUM_BACKEND=torch"
    if not HAS_TRITON:
        return "torch: triton is not installed"
    if torch.cuda.is_available():
        return f"triton: tensors on a GPU, TRITIUM_BACKEND={choice}"
    if choice == "triton":
        return "triton: TRITIUM_BACKEND=triton, in the interpreter"
    return "torch: tensors on the CPU, TRITIUM_BACKEND=auto"


# The process that compiles --------------------------------------------------------------------------------------------
def _row(op: str, launch: Launch, target: Target) -> dict[str, Any]:
    names = {"op": op, "kernel": launch.kernel.__name__, "config": launch.name, "target": target.name}
    file = _cache_folder() / f"{_key(launch, target)}.json"
    if file.exists():
        return names | json.loads(file.read_text())
    try:
        numbers = _compile(launch, target)
    except Exception as error:  # whatever the compiler throws is the finding
        return names | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as out:
        json.dump(numbers, out)
    os.replace(out.name, file)
    return names | numbers


def _cache_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("TRITIUM_CACHE", "~/.cache/tritium")).expanduser() / "doctor"


def _key(launch: Launch, target: Target) -> str:
    """A hash of all that the numbers depend on: kernel source with its callees, configuration, compiler, this file."""
    configuration = (launch.signature, launch.constexprs, launch.divisible, launch.num_warps, launch.num_stages)
    parts = (launch.kernel.cache_key, configuration, target, version_of("triton"), pathlib.Path(__file__).read_text())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _compile(launch: Launch, target: Target) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature = {name: launch.signature.get(name, "constexpr") for name in names}
    constexprs = {name: launch.constexprs[name] for name, kind in signature.items() if kind == "constexpr"}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible}
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constexprs, aligned),
        target=GPUTarget(target.backend, target.arch, target.warp_size),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    read = _read_cubin if target.backend == "cuda" else _read_amdgcn
    registers, spill_bytes, instructions = read(compiled.asm)
    return {
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": compiled.metadata.shared,
        "instructions": dict(sorted(collections.Counter(instructions).items())),
    }


def _read_cubin(asm: dict[str, Any]) -> tuple[int, int, list[str]]:
    """Registers and stack of a thread, and the instructions, of NVIDIA's machine code."""
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", cubin.name)
        sass = _output(tools / "nvdisasm", "-c", cubin.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack), _SASS.findall(sass)


def _read_amdgcn(asm: dict[str, Any]) -> tuple[int, int, list[str]]:
    """The same of AMD's assembly."""
    values = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", asm["amdgcn"], re.M)}
    registers = values["vgpr_count"] + values.get("agpr_count", 0)
    return registers, values["private_segment_fixed_size"], _AMDGCN.findall(asm["amdgcn"])


def _output(tool: pathlib.Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _compiling_process(request: dict[str, list[str]]) -> list[dict[str, Any]]:
    ops = {name: spec for name, spec in sorted(all_ops().items()) if name in (request["ops"] or all_ops())}
    targets = [TARGETS[name] for name in request["targets"]]
    tasks = [(op, launch, target) for op, spec in ops.items() for target in targets for launch in spec.launches(target)]
    with tempfile.TemporaryDirectory() as folder:  # Triton's own cache: ours holds the numbers
        os.environ["TRITON_CACHE_DIR"] = folder
        _TASKS.extend(tasks)
        with multiprocessing.get_context("fork").Pool(min(os.cpu_count(), len(tasks)) or 1) as pool:
            return pool.map(_row_of_task, range(len(tasks)), chunksize=1)


_TASKS: list[tuple[str, Launch, Target]] = []  # inherited by forked workers, since kernels can't be pickled


def _row_of_task(i: int) -> dict[str, Any]:
    return _row(*_TASKS[i])


if __name__ == "__main__":
    json.dump(_compiling_process(json.loads(sys.argv[1])), sys.stdout)
