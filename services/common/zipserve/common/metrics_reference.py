"""Writes the tables of docs/metrics.md: `python -P -m zipserve.common.metrics_reference docs/metrics.md`."""

import sys
from pathlib import Path

from zipserve.common.metrics import SERVICES, Described, Metrics

_END_OF_PROSE = "-->\n"
_COLUMNS = "| name | type | labels | unit | meaning |\n|---|---|---|---|---|\n"


def renewed(page: str) -> str:
    """The page with tables of all metrics below what people have written."""
    prose, _, _ = page.partition(_END_OF_PROSE)
    described = Metrics().described
    groups = sorted({metric.services for metric in described}, key=lambda services: (-len(services), services))
    tables = [
        f"\n## {_title(services)}\n\n{_COLUMNS}" + "".join(_row(m) for m in described if m.services == services)
        for services in groups
    ]
    return prose + _END_OF_PROSE + "".join(tables)


def _title(services: tuple[str, ...]) -> str:
    return "All services" if services == SERVICES else ", ".join(services).capitalize()


def _row(metric: Described) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {metric.unit} | {metric.meaning} |\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(renewed(path.read_text()))
