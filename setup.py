"""Builds mnnvl_backend._C: C++ through torch's extension builder, kernels through an explicit nvcc.

torch's own CUDAExtension refuses to work with a CPU-only torch. The kernels include no torch header, so they are
compiled here into plain objects by whichever nvcc is found, and the same build serves a CPU-only and a CUDA torch.

Variables: MNNVL_CUDA_ARCHS ("90;100", default: the GPUs present that are no older than 9.0, else 90 and 100),
MNNVL_WITH_CUDA (0: no kernels, 1: fail without nvcc), CUDA_HOME, MAX_JOBS.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# ninja from a wheel lies beside the interpreter, which need not be on the PATH.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

ROOT = Path(__file__).resolve().parent
CUDA_BUILD = ROOT / "build" / "kernels"
DEFAULT_ARCHS = ["90", "100"]
OLDEST_ARCH = 90  # the kernels use instructions of Hopper


def files(pattern: str) -> list[str]:
    """Sources relative to the project root, in a stable order."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob(pattern))


@dataclass
class Toolkit:
    """An nvcc and where its headers and static runtime lie; `archs` are real architectures, the last also as PTX.
    `note` says what was left out."""

    nvcc: str
    version: str
    include_dirs: list[str]
    library_dir: str
    archs: list[str]
    note: str


def wheel_dirs() -> list[Path]:
    """Folders of the nvidia-* wheels: nvidia/cu13 in newer ones, nvidia/cuda_nvcc, ... in older."""
    sites = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}
    return sorted({Path(d) for site in sites if site for d in glob.glob(os.path.join(site, "nvidia", "*"))})


def nvcc_candidates() -> list[str]:
    found = [os.path.join(os.environ[v], "bin", "nvcc") for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    found += filter(None, [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"])
    found += [str(d / "bin" / "nvcc") for d in wheel_dirs()]
    return [p for p in dict.fromkeys(found) if os.access(p, os.X_OK)]


def output_of(*command: str) -> str:
    """Standard output, empty if the command is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def asked_archs(asked: str) -> list[str]:
    archs = [a for a in re.split(r"[;,\s]+", asked) if a]
    if not archs or not all(re.fullmatch(r"\d{2,3}[af]?", a) for a in archs):
        raise SystemExit(f"MNNVL_CUDA_ARCHS: expected architectures like '90;100', got {asked!r}")
    old = [a for a in archs if int(a.rstrip("af")) < OLDEST_ARCH]
    if old:
        raise SystemExit(f"MNNVL_CUDA_ARCHS: the kernels need sm_{OLDEST_ARCH} or newer, got {', '.join(old)}")
    return archs


def present_archs() -> list[str]:
    """Of this machine's GPUs, oldest first."""
    query = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    return sorted({c.replace(".", "") for c in re.findall(r"^\s*(\d+\.\d)\s*$", query, re.M)}, key=int)


def choose_archs(nvcc: str) -> tuple[list[str], str]:
    """MNNVL_CUDA_ARCHS, else the GPUs present, else Hopper and Blackwell; none that this nvcc doesn't know, and none
    that the kernels can't run on: those are left out, which the note says. Empty if this nvcc is too old for any."""
    asked = os.environ.get("MNNVL_CUDA_ARCHS", "")
    if asked:
        return asked_archs(asked), ""
    present = present_archs()
    old = [a for a in present if int(a) < OLDEST_ARCH]
    note = f"GPUs older than sm_{OLDEST_ARCH} are left out (sm_{', sm_'.join(old)}): only CPU tensors work there"
    known = {a for a in re.findall(r"compute_(\d+)", output_of(nvcc, "--list-gpu-arch")) if int(a) >= OLDEST_ARCH}
    wanted = [a for a in present if a not in old] or DEFAULT_ARCHS
    return [a for a in wanted if a in known] or sorted(known, key=int)[-1:], note if old else ""


def find_toolkit() -> Toolkit | None:
    wish = os.environ.get("MNNVL_WITH_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"MNNVL_WITH_CUDA: expected 0 or 1, got {wish!r}")
    if wish == "0":
        return None
    for nvcc in nvcc_candidates():
        version = re.search(r"release [\d.]+, V([\d.]+)", output_of(nvcc, "--version"))
        # The real home: nvcc on the PATH may be a link or a wrapper script, and says where it stands in a dry run.
        dry = subprocess.run([nvcc, "-dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.M)
        if not version or not top:
            continue
        homes = [Path(top.group(1)).resolve(), *(d for d in wheel_dirs() if d.name in ("cuda_runtime", "cuda_cccl"))]
        includes = [str(d) for h in homes for d in (h / "include", h / "include" / "cccl") if d.is_dir()]
        libraries = [
            h / sub for h in homes for sub in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
        ]
        static = next((str(d) for d in libraries if (d / "libcudart_static.a").exists()), None)
        complete = all(any(Path(i, header).exists() for i in includes) for header in ("cuda_runtime.h", "nv/target"))
        if static and complete:
            archs, note = choose_archs(nvcc)
            if archs:
                return Toolkit(nvcc, version.group(1), includes, static, archs, note)
    if wish == "1":
        raise SystemExit(
            f"MNNVL_WITH_CUDA=1, but no nvcc that knows sm_{OLDEST_ARCH}, with cuda_runtime.h, nv/target and "
            "libcudart_static.a, was found: set CUDA_HOME, put nvcc on the PATH, or install nvidia-cuda-nvcc, "
            "nvidia-cuda-runtime and nvidia-cuda-cccl"
        )
    return None


def notice(toolkit: Toolkit | None) -> str:
    if toolkit:
        what = f"kernels for sm_{', sm_'.join(toolkit.archs)} (+ PTX) by {toolkit.nvcc} {toolkit.version}"
        return f"{what}; {toolkit.note}" if toolkit.note else what
    return (
        "no nvcc (CUDA_HOME, PATH, nvidia-cuda-nvcc wheel): building WITHOUT CUDA kernels; "
        "the package will work for CPU tensors only"
    )


def ninja_path(path: str | Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def kernel_sources() -> list[str]:
    """Without them the module would link, and fail when it is loaded."""
    missing = [kind for kind in ("*.cu", "*.cuh") if not files(kind)]
    if missing:
        raise SystemExit(
            f"nvcc was found, but csrc/kernels holds no {' and no '.join(missing)}: this source tree is incomplete. "
            "Take a whole one (a clone, or an sdist made with MANIFEST.in), or set MNNVL_WITH_CUDA=0: CPU tensors only"
        )
    return files("*.cu")


def build_kernels(toolkit: Toolkit) -> list[str]:
    """Compiles csrc/kernels/**/*.cu, only those whose source, headers or flags changed. Returns the objects."""
    # The longest first, which are the slowest, so that no core is idle while the last one compiles.
    sources = sorted(kernel_sources(), key=lambda source: -(ROOT / source).stat().st_size)
    # fmt: off
    flags = ["-std=c++17", "-O3", "-cudart", "static", "-DMNNVL_WITH_CUDA=1",
             f'-DMNNVL_ARCHITECTURES="{";".join(toolkit.archs)}"', f"-I{ROOT / 'csrc'}",
             *(f"-I{d}" for d in toolkit.include_dirs), "-Xcompiler", "-fPIC,-Wall",
             *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in toolkit.archs)]
    # fmt: on
    # PTX of the newest architecture, so that later GPUs can run what was built; 'a'/'f' variants don't carry forward.
    if toolkit.archs[-1].isdigit():
        flags.append(f"-gencode=arch=compute_{toolkit.archs[-1]},code=compute_{toolkit.archs[-1]}")
    CUDA_BUILD.mkdir(parents=True, exist_ok=True)
    command = shlex.join([toolkit.nvcc, *flags])
    lines = [
        f"rule nvcc\n  command = {command.replace('$', '$$')} -MD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc\n  description = nvcc $in\n"
    ]
    objects = []
    for source in sources:
        target = CUDA_BUILD / (re.sub(r"\W", "_", source.removesuffix(".cu")) + ".o")
        objects.append(str(target))
        lines.append(f"build {ninja_path(target)}: nvcc {ninja_path(ROOT / source)}\n")
    (CUDA_BUILD / "build.ninja").write_text("\n".join(lines))
    subprocess.run(["ninja", "-C", str(CUDA_BUILD), "-j", os.environ["MAX_JOBS"]], check=True)
    return objects


class Build(BuildExtension):
    """torch's builder after the kernels; always asks ninja, which knows better than distutils what is out of date."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True
        # An editable install would otherwise compile in a temporary folder, everything anew each time.
        platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        self.build_temp = str(ROOT / "build" / f"temp.{platform}")

    def build_extensions(self) -> None:
        # Here and not at import: pip runs this file for metadata too.
        os.environ.setdefault("MAX_JOBS", str(len(os.sched_getaffinity(0))))
        toolkit = find_toolkit()
        print(f"mnnvl_backend: {notice(toolkit)}", flush=True)
        for extension in self.extensions:
            extension.define_macros += [
                ("MNNVL_WITH_CUDA", "1" if toolkit else "0"),
                ("MNNVL_NVCC_VERSION", f'"{toolkit.version if toolkit else ""}"'),
            ]
            if toolkit:
                extension.extra_objects += build_kernels(toolkit)
                extension.extra_link_args += [
                    f"-L{toolkit.library_dir}",
                    "-l:libcudart_static.a",
                    "-ldl",
                    "-lrt",
                    "-lpthread",
                ]
        super().build_extensions()


# No -std here: torch's builder appends the one that its headers need (C++17 in 2.11, C++20 in 2.13).
setup(
    ext_modules=[
        CppExtension(
            "mnnvl_backend._C",
            sources=files("*.cpp"),
            depends=files("*.h"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": ["-O2", "-g0", "-Wall", "-fvisibility=hidden", "-ffp-contract=off"]},
            # Copies of static libraries stay ours: the CUDA runtime must not meet that of torch, nor a C++ runtime that
            # some compilers link statically that of the process.
            extra_link_args=["-Wl,--exclude-libs,ALL"],
        )
    ],
    cmdclass={"build_ext": Build.with_options(use_ninja=True)},
)
