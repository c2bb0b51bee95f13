"""Builds what tests need of the C++ below torch, incrementally, into build/native/:

    python tests/native/build.py module                      the test double as the Python module mnnvl_native
    python tests/native/build.py tests                       the native tests, an executable
    python tests/native/build.py tests --sanitizer thread    the same under a sanitizer (thread, address)
    python tests/native/build.py fuzz                        the harnesses of tests/fuzz, to replay their corpora
    python tests/native/build.py fuzz --engine libfuzzer     the same, to fuzz (CXX=clang++)

Prints the path of what it built, of harnesses their folder. CXX names the compiler, MAX_JOBS the number of compilers
at once. Needs ninja, and for the module the headers of Python and of pybind11, which torch brings along; nothing here
includes or links torch.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "tests" / "native"
FUZZ = ROOT / "tests" / "fuzz"
# The layers below torch. Of kernels/ this is what stands in where no nvcc is.
LAYERS = ("common", "system", "protocol", "driver", "bootstrap", "memory", "kernels", "cpu", "tuning", "transport")
PARSERS = ("system", "driver", "bootstrap", "memory")  # those of them that read what comes from outside
WARNINGS = [
    "-std=c++17",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-missing-field-initializers",
    "-Wno-unknown-pragmas",
    "-Werror",
]
SANITIZERS = {
    "none": ["-O1", "-g1", "-U_FORTIFY_SOURCE"],  # which forbids longjmp() between stacks
    # TSan can't follow atomic_thread_fence; GCC says so at each one, and so it is an error.
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
}


# Compiled with, linked with. Replaying shares its objects with the tests under AddressSanitizer.
ENGINES = {
    "replay": (SANITIZERS["address"], ["-fsanitize=address,undefined"]),
    "libfuzzer": (
        ["-O1", "-g1", "-fsanitize=fuzzer-no-link,address,undefined", "-fno-sanitize-recover=all"],
        ["-fsanitize=fuzzer,address,undefined"],
    ),
}
Targets = dict[str, list[Path]]  # what is linked, and its sources


class BuildError(RuntimeError):
    """The compiler's words."""


def sources(of_tests: bool, emulation: bool) -> list[Path]:
    """The layers; the double, and either the tests of it or its Python face. With `emulation` the kernels that can be
    run on a CPU, in fibers, which sanitizers can't follow, and their tests; else the empty table of kernels."""
    layers = [source for layer in LAYERS for source in (ROOT / "csrc" / layer).rglob("*.cpp")]
    native = [s for s in NATIVE.glob("*.cpp") if of_tests or not s.name.startswith("test_")]
    if emulation:
        layers.remove(ROOT / "csrc/kernels/host/none.cpp")
        native += (NATIVE / "emulation").glob("*.cpp")
    elif of_tests:
        native = [s for s in native if s.name not in ("test_exchange.cpp", "test_fused.cpp", "test_all_reduce.cpp")]
    return sorted(layers) + sorted(s for s in native if not of_tests or s.name != "bindings.cpp")


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(command[0]) is None:
        raise BuildError(f"no C++ compiler {command[0]!r} (CXX); on Debian and Ubuntu: apt install g++")
    return command


def find_ninja() -> str:
    beside = Path(sys.executable).with_name("ninja")  # of a wheel, in a virtual environment that isn't active
    ninja = str(beside) if beside.exists() else shutil.which("ninja")
    if ninja is None:
        raise BuildError("ninja is needed to build tests/native: pip install ninja, or apt install ninja-build")
    return ninja


def escaped(text: str | Path) -> str:
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja(folder: Path, targets: Targets, compile_flags: list[str], link: list[str]) -> None:
    cxx = shlex.join(compiler())
    # Where a kernel's source is compiled for the CPU, what it includes of CUDA is found in emulation/.
    flags = shlex.join(
        [
            f"-I{NATIVE / 'emulation'}",
            f"-I{ROOT / 'csrc'}",
            f"-I{ROOT / 'tests'}",
            "-DMNNVL_WITH_CUDA=0",
            *compile_flags,
        ]
    )
    lines = [
        f"rule compile\n  command = {cxx} {flags.replace('$', '$$')} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = $in",
        f"rule link\n  command = {cxx} $in -o $out {shlex.join(link).replace('$', '$$')}\n  description = $out",
    ]
    objects = {
        source: escaped(str(source.relative_to(ROOT).with_suffix(".o")).replace("/", "_"))
        for sources in targets.values()
        for source in sources
    }
    lines += [f"build {name}: compile {escaped(source)}" for source, name in objects.items()]
    for target, sources in targets.items():
        linked = " ".join(objects[source] for source in sources)
        lines.append(f"build {escaped(target)}: link {linked}\ndefault {escaped(target)}\n")
    text = "\n".join(lines)
    path = folder / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def build(name: str, targets: Targets, compile_flags: list[str], link: list[str]) -> Path:
    """Brings the targets in the folder build/native/<name> up to date. Processes that ask for the same wait for each
    other."""
    folder = ROOT / "build" / "native" / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_ninja(folder, targets, compile_flags, link)
        jobs = os.environ.get("MAX_JOBS", str(len(os.sched_getaffinity(0))))
        done = subprocess.run([find_ninja(), "-C", str(folder), "-j", jobs], capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"building {folder} failed:\n{done.stdout}{done.stderr}")
    return folder


def build_module() -> Path:
    torch = importlib.util.find_spec("torch")  # found, not imported
    folders = torch.submodule_search_locations if torch else None
    if not folders:
        raise BuildError("pybind11's headers are taken from torch, which this Python doesn't have")
    includes = ["-isystem", sysconfig.get_paths()["include"], "-isystem", os.path.join(folders[0], "include")]
    flags = [*WARNINGS, *includes, "-O1", "-g", "-fPIC", "-fvisibility=hidden"]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    # As in setup.py: a C++ runtime that some compilers link statically must not meet that of the process.
    link = ["-shared", "-Wl,--exclude-libs,ALL", "-ldl", "-lpthread"]
    targets = {f"mnnvl_native{suffix}": sources(of_tests=False, emulation=False)}
    return build(f"module{suffix.removesuffix('.so')}", targets, flags, link) / f"mnnvl_native{suffix}"


def build_tests(sanitizer: str = "none", name: str | None = None, static: bool = False) -> Path:
    flags = [*WARNINGS, *SANITIZERS[sanitizer]]
    link = [f for f in SANITIZERS[sanitizer] if f.startswith("-fsanitize")] + ["-ldl", "-lpthread"]
    if static:
        link.append("-static")
    # A static one is for an emulated processor, where fibers that spin take minutes.
    what = sources(of_tests=True, emulation=sanitizer == "none" and not static)
    return build(name or f"tests-{sanitizer}", {"native_tests": what}, flags, link) / "native_tests"


def build_fuzz(engine: str) -> Path:
    """Each harness of tests/fuzz is an executable, of its name."""
    layers = [source for layer in PARSERS for source in sorted((ROOT / "csrc" / layer).rglob("*.cpp"))]
    replay = FUZZ / "replay.cpp"
    layers += [replay] if engine == "replay" else []
    targets = {harness.stem: [harness, *layers] for harness in sorted(FUZZ.glob("*.cpp")) if harness != replay}
    compile_flags, link = ENGINES[engine]
    folder = "tests-address" if engine == "replay" else f"fuzz-{engine}"
    return build(folder, targets, [*WARNINGS, *compile_flags], [*link, "-ldl", "-lpthread"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the test double, the native tests, or the fuzzers' harnesses.")
    parser.add_argument("what", choices=["module", "tests", "fuzz"])
    parser.add_argument("--sanitizer", choices=sorted(SANITIZERS), default="none")
    parser.add_argument("--name", help="folder below build/native/, for another compiler (tests only)")
    parser.add_argument("--static", action="store_true", help="link statically (tests only)")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="replay", help="who feeds a harness (fuzz only)")
    asked = parser.parse_args()
    try:
        if asked.what == "tests":
            print(build_tests(asked.sanitizer, asked.name, asked.static))
        else:
            print(build_module() if asked.what == "module" else build_fuzz(asked.engine))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
