"""`zipserve version`: versions from the installed packages' metadata; nothing heavy is imported."""

import argparse
import platform
from importlib import metadata

_PACKAGES = ("zipserve", "torch", "transformers", "nixl", "grpcio")


def run(_: argparse.Namespace) -> int:
    """Prints one line per package."""
    print(f"{'python':<14}{platform.python_version()}")
    for package in _PACKAGES:
        print(f"{package:<14}{_version(package)}")
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
