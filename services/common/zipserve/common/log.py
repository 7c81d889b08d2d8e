"""Structured logs: one JSON object per line on stderr; the event is a constant `noun.verb`."""

import logging
import sys
from typing import Any

import structlog

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(*, level: str, style: str, **bound: Any) -> None:
    """Sets up structlog for the process. `bound` are keys on every line, such as the service and the worker's id."""
    renderer: structlog.typing.Processor
    if style == "json":
        renderer = structlog.processors.JSONRenderer(default=str)
        # without the frames' variables, which are prompts and secrets
        exceptions: structlog.typing.Processor = structlog.processors.ExceptionRenderer(
            structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        )
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        exceptions = structlog.processors.format_exc_info

    def bind(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**bound, **event}

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            bind,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            exceptions,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )


def get() -> structlog.typing.FilteringBoundLogger:
    """A logger that follows `configure`, whenever that is called."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
