"""Assembles CUDA kernels without a GPU and reads what the assembler says.

    python3 assemble.py FOLDER [--kernel NAME] [--strict]

Every FOLDER/*.cu goes through NVRTC with the options that CubeCL gives it, once for each
architecture; registers, spills and warnings come from the assembler's log, instruction counts from
the disassembly. Writes FOLDER/report.json and prints a table. With --kernel only that kernel, and
the main loop of its machine code goes to FOLDER/NAME.ARCH.sass. With --strict, a kernel that doesn't
compile, spills more than a few words or draws a C75xx warning (a broken wgmma pipeline) fails the run.

Needs nvidia-cuda-nvrtc, nvidia-cuda-runtime, nvidia-cuda-cccl (headers) and nvidia-cuda-nvdisasm on
PYTHONPATH: `cargo xtask sass` fetches them.
"""

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90a")
# What only Hopper and later have: a kernel that uses one is not compiled for sm_80.
HOPPER = re.compile(
    r"wgmma|setmaxnreg|cp\.async\.bulk|__grid_constant__ CUtensorMap|stmatrix|mapa\.|__cluster_dims__|griddepcontrol"
)
# The assembler rounds registers down to where another block fits on a multiprocessor, and spills a
# few words for it. More than that is a fault of the kernel.
FEW_BYTES = 64
TENSOR = ("HMMA", "HGMMA")
SHOWN = (*TENSOR, "LDSM", "LDGSTS", "UTMALDG", "MUFU", "BAR", "SYNCS", "LDL", "STL")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")


@cache
def toolkit() -> Path:
    import nvidia

    found = [Path(folder) / "cu13" for folder in nvidia.__path__]
    return next(folder for folder in found if (folder / "bin/nvdisasm").is_file())


@cache
def nvrtc() -> ctypes.CDLL:
    libraries = toolkit() / "lib"
    # NVRTC opens its builtins by bare name, which finds them only if they are loaded already.
    builtins = sorted(libraries.glob("libnvrtc-builtins.so.*"))[0]
    ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(libraries / "libnvrtc.so.13"))


def compile_source(source: bytes, arch: str) -> tuple[bytes | None, str]:
    """The machine code, none where the source is refused, and the log."""
    lib, program = nvrtc(), ctypes.c_void_p()
    include = toolkit() / "include"
    options = [
        f"--gpu-architecture={arch}",
        f"--include-path={include}",
        f"--include-path={include / 'cccl'}",
        "-lineinfo",
        "--ptxas-options=-v",
    ]

    def text(what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(lib, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    if lib.nvrtcCreateProgram(ctypes.byref(program), source, None, 0, None, None):
        raise RuntimeError("NVRTC makes no program")
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    failed = lib.nvrtcCompileProgram(program, len(options), array)
    log = text("ProgramLog").rstrip(b"\0").decode(errors="replace")
    machine_code = None if failed else text("CUBIN")
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return machine_code, log


def disassemble(machine_code: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [toolkit() / "bin/nvdisasm", "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def read_log(log: str) -> dict:
    """The sums of what ptxas -v says of each function; the largest register count."""
    numbers = lambda pattern: [int(number) for number in re.findall(pattern, log)]
    return {
        "registers": max(numbers(r"Used (\d+) registers"), default=0),
        "barriers": max(numbers(r"used (\d+) barriers"), default=0),
        "stack": sum(numbers(r"(\d+) bytes stack frame")),
        "spill_stores": sum(numbers(r"(\d+) bytes spill stores")),
        "spill_loads": sum(numbers(r"(\d+) bytes spill loads")),
        # Shared memory of a size set at launch isn't known here.
        "static_shared": max(numbers(r"(\d+) bytes smem"), default=0),
        "warnings": sorted(set(re.findall(r"\((C75\d\d)\)", log))),
    }


def count(lines: list[str]) -> Counter:
    return Counter(found[1] for line in lines if (found := INSTRUCTION.match(line)))


def main_loop(sass: str) -> list[str]:
    """The lines of the innermost loop with the most tensor-core instructions.

    A kernel without them has the longest innermost loop instead; one without a loop, nothing.
    """
    lines = sass.splitlines()
    labels = {line[:-1]: at for at, line in enumerate(lines) if re.match(r"\.L_\w+:$", line)}
    loops = []
    for at, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        # A branch to itself is the trap behind the last instruction.
        if target and labels.get(target[1], at) < at and count(lines[labels[target[1]] : at]):
            loops.append((labels[target[1]], at + 1))
    tensor = lambda loop: sum(count(lines[slice(*loop)])[name] for name in TENSOR)
    if any(map(tensor, loops)):
        loops = list(filter(tensor, loops))
    encloses = lambda a, b: a != b and a[0] <= b[0] and b[1] <= a[1]
    innermost = [a for a in loops if not any(encloses(a, b) for b in loops)]
    best = max(innermost, key=lambda loop: (tensor(loop), loop[1] - loop[0]), default=(0, 0))
    return lines[slice(*best)]


def assemble(path: Path, arch: str, keep: bool) -> dict:
    source = path.read_bytes()
    report = {"kernel": path.stem, "arch": arch}
    needs = arch == "sm_80" and HOPPER.search(source.decode())
    if needs:
        return report | {"skipped": f"uses {needs[0]}"}
    machine_code, log = compile_source(source, arch)
    if machine_code is None:
        return report | {"error": log}
    threads = re.search(rb"__launch_bounds__\((\d+)", source)
    sass = disassemble(machine_code)
    loop = main_loop(sass)
    if keep:
        path.with_name(f"{path.stem}.{arch}.sass").write_text("\n".join(loop or sass.splitlines()))
    return (
        report
        | {"threads": int(threads[1]) if threads else None}
        | read_log(log)
        | {"instructions": dict(count(sass.splitlines()).most_common())}
        | {"main_loop": dict(count(loop).most_common())}
    )


def table(reports: list[dict]) -> str:
    head = ["kernel", "arch", "threads", "regs", "stack", "spill st/ld", "smem", "barriers"]
    rows = [[*head, *SHOWN, "main loop", "notes"]]
    for report in reports:
        start = [report["kernel"], report["arch"]]
        note = report.get("skipped") or ("does not compile" if "error" in report else "")
        if note:
            rows.append(start + ["-"] * (len(rows[0]) - 3) + [note])
            continue
        counts, loop = report["instructions"], report["main_loop"]
        inside = [f"{loop[name]} {name}" for name in (*TENSOR, "MUFU") if name in loop]
        rows.append(
            start
            + [str(report[key] or "-") for key in ("threads", "registers", "stack")]
            + [f"{report['spill_stores']}/{report['spill_loads']}"]
            + [str(report[key]) for key in ("static_shared", "barriers")]
            + [str(counts.get(name, 0)) for name in SHOWN]
            + [", ".join([f"{sum(loop.values())} instr", *inside]) if loop else "-"]
            + [" ".join(report["warnings"])]
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def faults(report: dict) -> list[str]:
    """Why a report fails a strict run."""
    if "error" in report:
        return [f"does not compile\n{report['error']}"]
    found = []
    if report.get("spill_stores", 0) > FEW_BYTES:
        stores, loads = report["spill_stores"], report["spill_loads"]
        found.append(f"spills {stores} bytes, loads {loads}, at {report['registers']} registers")
    return found + report.get("warnings", [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kernel")
    parser.add_argument("--strict", action="store_true")
    args = parser.parse_args()

    sources = sorted(args.folder.glob("*.cu"))
    if args.kernel:
        names = ", ".join(path.stem for path in sources)
        sources = [path for path in sources if path.stem == args.kernel]
        if not sources:
            sys.exit(f"there is no kernel {args.kernel!r}; there are {names}")
    if not sources:
        sys.exit(f"{args.folder} holds no .cu file")
    jobs = [(path, arch, bool(args.kernel)) for path in sources for arch in ARCHITECTURES]
    with ThreadPoolExecutor() as pool:
        reports = list(pool.map(assemble, *zip(*jobs)))

    (args.folder / "report.json").write_text(json.dumps(reports, indent=1))
    print(table(reports))
    failing = [(report, fault) for report in reports for fault in faults(report)]
    for report, fault in failing:
        print(f"{report['kernel']} for {report['arch']}: {fault}", file=sys.stderr)
    if failing and args.strict:
        sys.exit(1)


if __name__ == "__main__":
    main()
