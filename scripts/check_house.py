"""Checks the house rules (csrc/README.md): who may include what, and how long things may be.

bindings -> backend -> transport -> {kernels/kernels.h, cpu, tuning, memory, bootstrap} -> driver -> system, common
protocol sees only common; kernels sees protocol; cpu sees protocol and system; tests/native and tests/fuzz all that is
below torch
torch headers in backend/ and bindings.cpp only; <<< in kernels/*.cu and *.cuh only
no file over 400 lines, no function over 80, no line over 120 columns
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".h", ".cpp", ".cu", ".cuh", ".inc", ".py", ".pyi")
MOST_LINES, MOST_FUNCTION_LINES, MOST_COLUMNS = 400, 80, 120

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)
TORCH = re.compile(r"^(torch|c10|c10d|ATen|pybind11)/")
CUDA = re.compile(r"^(cuda|cooperative_groups|cub|nccl|nvml)")
KERNELS_FACE = "kernels/kernels.h"  # all that others may see of the kernels
EMULATION = ROOT / "tests/native/emulation"  # compiles the kernels' own source
BINDINGS = ("csrc/bindings.cpp", "tests/native/bindings.cpp")  # the only ones that see pybind11

# Layer -> layers whose headers it may include, beside its own. "kernels" here means KERNELS_FACE.
BELOW_BOOTSTRAP = {"driver", "system", "common"}
BELOW_TRANSPORT = {"kernels", "cpu", "tuning", "memory", "bootstrap", "protocol"} | BELOW_BOOTSTRAP
MAY_SEE: dict[str, set[str]] = {
    "common": set(),
    "protocol": {"common"},
    "system": {"common"},
    "driver": {"system", "common"},
    "bootstrap": BELOW_BOOTSTRAP,
    "memory": {"bootstrap", "protocol"} | BELOW_BOOTSTRAP,
    "kernels": {"protocol", "common"},
    "cpu": {"protocol", "system", "common"},
    "tuning": {"protocol", "common"},
    "transport": BELOW_TRANSPORT,
    "backend": {"transport"} | BELOW_TRANSPORT,
    "bindings": {"backend", "transport"} | BELOW_TRANSPORT,
    "native": {"transport", "fuzz"} | BELOW_TRANSPORT,  # of tests/fuzz too
}

Problem = tuple[int, str]  # line, what


def blank(text: str, pattern: str) -> str:
    """`text` with the matches made of spaces; lines and columns stay."""
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.S | re.M)


def line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def layer_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "tests"):
        return "native"
    relative = path.relative_to(ROOT / "csrc")
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def include_problem(path: Path, layer: str, angled: bool, header: str) -> Iterator[str]:
    pybind_only = str(path.relative_to(ROOT)) in BINDINGS and header.startswith("pybind11/")
    if TORCH.match(header) and layer not in ("backend", "bindings") and not pybind_only:
        yield f"torch header {header} in {layer}/"
    if CUDA.match(header) and angled and layer != "kernels":
        yield f"CUDA header {header} outside kernels/ (a build without CUDA has none)"
    if angled:
        return
    roots = [ROOT / "csrc"] + ([ROOT / "tests"] if layer == "native" else [])
    if not any((root / header).is_file() for root in roots):
        yield f'"{header}" is not a path from csrc/'
    other = header.split("/")[0]
    if other != layer and other not in MAY_SEE[layer]:
        yield f"{layer} may not include {header}"
    elif layer != "kernels" and other == "kernels" and header != KERNELS_FACE and EMULATION not in path.parents:
        yield f"only {KERNELS_FACE} is visible outside kernels/"


def include_problems(path: Path, code: str) -> Iterator[Problem]:
    layer = layer_of(path)
    if layer not in MAY_SEE:
        yield 1, f"layer {layer!r} is not known to {Path(__file__).name}"
        return
    for match in INCLUDE.finditer(code):
        for what in include_problem(path, layer, match[1] == "<", match[2]):
            yield line_of(code, match.start(2)), what
    if layer != "kernels" or path.suffix not in (".cu", ".cuh"):
        for match in re.finditer("<<<", blank(code, r'"(?:\\.|[^"\\\n])*"')):
            yield line_of(code, match.start()), "kernel launch outside kernels/*.cu"


def cpp_functions(code: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, last line) of each function that stands in a namespace or class. By braces: what opens one is
    told by the text since the last ; { or }. A lambda is part of the function that it stands in."""
    code = blank(code, r'R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|' + r"'(?:\\.|[^'\\\n])+'(?!\w)")
    code = blank(code, r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*")
    open_braces: list[tuple[str, int] | None] = []  # of a function: its name and begin
    begin = 0  # of the text since the last ; { or }
    functions = parentheses = 0  # open braces in a function, open parentheses outside
    for match in re.finditer(r"[(){};]", code):
        if match[0] in "()":
            parentheses += 0 if functions else 1 if match[0] == "(" else -1
            continue
        if parentheses:  # a default argument
            continue
        if match[0] == "{":
            opener = code[begin : match.start()]
            container = re.search(r"\b(namespace|class|struct|union|enum|extern)\b[^()=]*$", opener)
            if not functions and not container and "(" in opener:
                signature = re.sub(r"^\s*template\s*<.*?>\s*(?=\w)", "", opener)
                name = re.search(r"((?!__)\b[~\w:]+|operator\W+)\s*\(", signature)
                start = begin + len(opener) - len(opener.lstrip())
                open_braces.append((name[1] if name else "?", start))
            else:
                open_braces.append(None)
            functions += open_braces[-1] is not None or functions > 0
        elif match[0] == "}" and open_braces:
            function = open_braces.pop()
            functions -= functions > 0
            if function is not None:
                yield function[0], line_of(code, function[1]), line_of(code, match.start())
        begin = match.end()


def python_functions(text: str) -> Iterator[tuple[str, int, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno, node.end_lineno or node.lineno


def length_problems(text: str, functions: Iterable[tuple[str, int, int]]) -> Iterator[Problem]:
    lines = text.splitlines()
    if len(lines) > MOST_LINES:
        yield 1, f"{len(lines)} lines; at most {MOST_LINES}"
    for number, line in enumerate(lines, 1):
        if len(line) > MOST_COLUMNS:
            yield number, f"{len(line)} columns; at most {MOST_COLUMNS}"
    for name, first, last in functions:
        if last - first + 1 > MOST_FUNCTION_LINES:
            yield first, f"function {name} has {last - first + 1} lines; at most {MOST_FUNCTION_LINES}"


def problems(path: Path) -> list[Problem]:
    text = path.read_text()
    if path.suffix in (".py", ".pyi"):
        return list(length_problems(text, python_functions(text)))
    code = blank(text, r"//[^\n]*|/\*.*?\*/")
    return [*include_problems(path, code), *length_problems(text, cpp_functions(code))]


def main() -> int:
    cpp = [
        p
        for s in ("*.h", "*.cpp", "*.cu", "*.cuh", "*.inc")
        for d in ("csrc", "tests/native", "tests/fuzz")
        for p in (ROOT / d).rglob(s)
    ]
    python = [p for s in ("*.py", "*.pyi") for d in ("mnnvl_backend", "tests/native") for p in (ROOT / d).rglob(s)]
    files = sorted(cpp + python)
    bad = [f"{path.relative_to(ROOT)}:{line}: {what}" for path in files for line, what in problems(path)]
    print("\n".join(bad) or f"{len(files)} files keep the rules")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
