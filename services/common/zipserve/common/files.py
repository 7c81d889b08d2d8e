"""Files that are exchanged while a service runs."""

from pathlib import Path


def version(path: Path) -> object:
    """Changes with the file; also when a link on the way, as that of a Kubernetes secret, points to another one."""
    try:
        found = path.stat()
    except OSError as error:
        return error.errno
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
