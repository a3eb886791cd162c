"""A progress bar where tqdm is installed, a few plain lines where it is not."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Progress(Generic[T]):
    """Iterate over `items` and show on stderr what runs, how far it is and how long it takes.

    `before` counts items that an earlier run has done.
    """

    def __init__(self, items: Sequence[T], what: str, show: bool = True, before: int = 0) -> None:
        self.items, self.what, self.show, self.before = items, what, show, before
        self.numbers = ""

    def __iter__(self) -> Iterator[T]:
        total = self.before + len(self.items)
        self.bar = _bar(self.what, total, self.before) if self.show else None
        started = time.monotonic()
        try:
            for done, item in enumerate(self.items, start=self.before + 1):
                yield item
                if self.bar is not None:
                    self.bar.update()
                elif self.show and done * 10 // total > (done - 1) * 10 // total:
                    seconds = time.monotonic() - started
                    line = f"{self.what}: {done}/{total}, {seconds:.0f} s {self.numbers}"
                    print(line, file=sys.stderr, flush=True)
        finally:
            if self.bar is not None:
                self.bar.close()

    def note(self, **numbers: float) -> None:
        """Show numbers beside the bar."""
        self.numbers = " ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self.bar is not None:
            self.bar.set_postfix_str(self.numbers, refresh=False)


def _bar(what: str, total: int, initial: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(desc=what, total=total, initial=initial, dynamic_ncols=True)
