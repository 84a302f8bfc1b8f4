"""What dm_control reports through absl and a user can do nothing about."""

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def unreported(text: str) -> Iterator[None]:
    """Keeps messages that hold `text` out of absl's log while the block runs."""
    absl = logging.getLogger("absl")

    def is_news(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    absl.addFilter(is_news)
    try:
        yield
    finally:
        absl.removeFilter(is_news)
