"""The README's tables of what is served, from the package's list of it, which the tests and `mnnvl soak` go through;
`python tests/operations.py` prints them."""

from __future__ import annotations

from mnnvl_backend.tools.soak_operations import REDUCTIONS, SUPPORT


def tables() -> str:
    """The README's."""
    rows = ["| operation | calls | dtypes |", "| --- | --- | --- |"]
    for name, operation in SUPPORT.items():
        dtypes = "by ReduceOp, below" if operation.reduces else "every" if operation.every_dtype else "-"
        rows.append(f"| {name} | {', '.join(operation.forms.values())} | {dtypes} |")
    rows += ["", "| ReduceOp | dtypes |", "| --- | --- |"]
    ops_of: dict[str, list[str]] = {}
    for op, dtypes_of_op in REDUCTIONS.items():
        ops_of.setdefault(", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes_of_op), []).append(op)
    return "\n".join([*rows, *(f"| {', '.join(ops)} | {dtypes} |" for dtypes, ops in ops_of.items())])


if __name__ == "__main__":
    print(tables())
