"""What `zipserve up` leaves in the folder of its logs for other commands: how to find what runs there."""

import json
import os
from pathlib import Path

STACK_FILE = "stack.json"


def write(log_dir: Path, redis_url: str, cluster: str, secret: str) -> None:
    """Leaves the file, for its owner only: the cluster's secret is in it."""
    path = log_dir / STACK_FILE
    path.unlink(missing_ok=True)  # one of an earlier run may be readable to others, or a link
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"redis_url": redis_url, "cluster": cluster, "secret": secret}, file)


def read(log_dir: Path) -> dict[str, str]:
    """What was left: redis_url, cluster and secret.

    Raises:
        OSError, ValueError: there is no such file, or it does not say.
    """
    found = json.loads((log_dir / STACK_FILE).read_text())
    return {name: str(found[name]) for name in ("redis_url", "cluster", "secret") if name in found}
