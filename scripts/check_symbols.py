"""Checks that the shipped module holds nothing of the test double (tests/native): no symbol, no string.

    python scripts/check_symbols.py [module.so or wheel ...]      default: the module beside this source tree's package
    python scripts/check_symbols.py --double double.so            the opposite: the check must see the double there

A wheel must also hold no source or test, and exactly one compiled module. Needs nm (binutils).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Names of tests/native: its namespace, its classes, and words that only its objects carry.
MARKS = re.compile(
    r"mnnvl::fake|fake_|Fake(Driver|Setup)|mnnvl-fake|ThreadExchange(?!Stream)|FileExchange|SIMULATED_ERROR"
)
SHIPPED = re.compile(r"mnnvl_backend/([\w/]+\.pyi?|py\.typed|_C\.[\w.-]+\.so)|mnnvl_backend-[\w.]+\.dist-info/.+")


def names_in(module: Path) -> str:
    """Symbols, demangled, and printable strings."""
    texts = []
    for flags in ("-C", "-DC"):
        texts.append(subprocess.run(["nm", flags, str(module)], capture_output=True, text=True, check=True).stdout)
    if "PyInit_" not in texts[1]:
        raise SystemExit(f"{module}: nm sees no entry point: not a Python module, or nothing that can be checked")
    texts.append("\n".join(s.decode() for s in re.findall(rb"[ -~]{6,}", module.read_bytes())))
    return "\n".join(texts)


def problems_of_module(module: Path) -> list[str]:
    found = sorted({line.strip() for line in names_in(module).splitlines() if MARKS.search(line)})
    return [f"{module.name}: of the test double: {line[:200]}" for line in found[:20]]


def problems_of_wheel(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        bad = [f"{wheel.name} holds {name}" for name in names if not SHIPPED.fullmatch(name)]
        modules = [name for name in names if name.endswith(".so")]
        if len(modules) != 1:
            bad.append(f"{wheel.name} holds {len(modules)} compiled modules, expected one: {modules}")
        for name in modules:
            bad += problems_of_module(Path(archive.extract(name, folder)))
    return bad


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--double"]:
        seen = problems_of_module(Path(arguments[1]))
        print(f"{len(seen)} marks of the double seen in the double itself")
        return 0 if seen else 1
    files = [Path(a) for a in arguments] or sorted((ROOT / "mnnvl_backend").glob("_C.*.so"))
    if not files:
        print("no compiled module to check: build it first")
        return 1
    bad = [p for f in files for p in (problems_of_wheel(f) if f.suffix == ".whl" else problems_of_module(f))]
    print("\n".join(bad) or f"nothing of the test double in {', '.join(f.name for f in files)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
