"""This package's version."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def version() -> str:
    """Of the source tree that this package lies in, else of the installed distribution. In that order: a tree that is
    used in place may lie on a path where another version is installed as well."""
    root = Path(__file__).resolve().parents[1]
    if (root / "VERSION").is_file() and (root / "pyproject.toml").is_file():
        return (root / "VERSION").read_text().strip()
    try:
        return metadata.version("mnnvl-backend")
    except metadata.PackageNotFoundError:
        return "unknown"
