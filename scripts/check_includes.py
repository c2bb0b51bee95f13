"""Checks who may include what in csrc/ (the house rules; csrc/README.md):

bindings -> backend -> {kernels/launch.h, cpu, memory, bootstrap} -> driver -> common
protocol sees only common; kernels and cpu see protocol and common
torch headers in backend/ and bindings.cpp only; <<< in kernels/*.cu and *.cuh only
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)
LAUNCH = re.compile(r"<<<")
TORCH = re.compile(r"^(torch|c10|c10d|ATen|pybind11)/")
CUDA = re.compile(r"^(cuda|cooperative_groups|cub|nccl|nvml)")

# Layer -> layers whose headers it may include, beside its own.
MAY_SEE: dict[str, set[str]] = {
    "common": set(),
    "protocol": {"common"},
    "driver": {"common"},
    "bootstrap": {"driver", "common"},
    "memory": {"bootstrap", "driver", "protocol", "common"},
    "kernels": {"protocol", "common"},
    "cpu": {"protocol", "common"},
    "backend": {"cpu", "memory", "bootstrap", "driver", "protocol", "common"},
    "bindings": {"backend", "cpu", "memory", "bootstrap", "driver", "protocol", "common"},
}
KERNELS_FACE = "kernels/launch.h"  # all that backend and bindings may see of the kernels


def layer_of(path: Path) -> str:
    relative = path.relative_to(CSRC)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def problems(path: Path) -> list[str]:
    layer = layer_of(path)
    if layer not in MAY_SEE:
        return [f"layer {layer!r} is not known to {Path(__file__).name}"]
    text = path.read_text()
    code = re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S)
    found = []
    for match in INCLUDE.finditer(code):
        header, line = match[2], code[: match.start(2)].count("\n") + 1
        if TORCH.match(header) and layer not in ("backend", "bindings"):
            found.append(f"{line}: torch header {header} in {layer}/")
        if CUDA.match(header) and match[1] == "<" and layer != "kernels":
            found.append(f"{line}: CUDA header {header} outside kernels/ (a build without CUDA has none)")
        if match[1] == "<":
            continue
        if not (CSRC / header).is_file():
            found.append(f'{line}: "{header}" is not a path from csrc/')
        other = header.split("/")[0]
        allowed = other == layer or other in MAY_SEE[layer]
        if not allowed and not (header == KERNELS_FACE and layer in ("backend", "bindings")):
            found.append(f"{line}: {layer} may not include {header}")
        if layer != "kernels" and other == "kernels" and header != KERNELS_FACE:
            found.append(f"{line}: only {KERNELS_FACE} is visible outside kernels/")
    if layer != "kernels" or path.suffix not in (".cu", ".cuh"):
        found += [f"{code[: m.start()].count(chr(10)) + 1}: kernel launch" for m in LAUNCH.finditer(code)]
    return found


def main() -> int:
    files = sorted(p for s in ("*.h", "*.cpp", "*.cu", "*.cuh") for p in CSRC.rglob(s))
    bad = [f"csrc/{path.relative_to(CSRC)}:{problem}" for path in files for problem in problems(path)]
    print("\n".join(bad) or f"{len(files)} files keep the rules")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
