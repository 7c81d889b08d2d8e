"""`zipserve keys new`: draws an API key. The key goes to stderr and its line for the keys file to stdout, so that
`zipserve keys new --name team-a >> keys.jsonl` does all that is needed."""

import argparse
import sys

from zipserve.common import api_keys


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    key = api_keys.draw()
    print(f"key of {options.name}, shown only now: {key}", file=sys.stderr)
    limits = {
        "cache_salt": options.name if options.cache_salt is None else options.cache_salt,
        "priority_max": options.priority_max,
        "requests_max": options.requests_max,
        "expires_at": options.expires_at,
    }
    print(api_keys.line(key, options.name, **limits))
    return 0
