"""Which pages of the full-attention caches are free, and how many hold on to each of the others."""

from collections.abc import Iterable


class IntegrityError(AssertionError):
    """The books contradict themselves: a bug in the engine, after which no page can be trusted."""


class PagePool:
    """Counts references to the pages of one data-parallel group.

    A page is free when nothing refers to it. Sequences' references and the prefix cache's are counted apart, so that
    at any moment it is known how many pages only the cache holds. Every operation costs O(1) a page.

    Args:
        pages: How many there are; they are numbered from 0.
    """

    def __init__(self, pages: int) -> None:
        if pages < 1:
            raise ValueError(f"a pool of {pages} pages; expected at least one")
        self.total = pages
        self._free = list(range(pages - 1, -1, -1))  # taken from the end: the page freed last is used first
        self._sequences = [0] * pages
        self._cached = [0] * pages
        self._idle = 0

    @property
    def free(self) -> int:
        """Pages that nothing refers to."""
        return len(self._free)

    @property
    def idle(self) -> int:
        """Pages that only the prefix cache refers to."""
        return self._idle

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` free pages, each with one reference; None, and none taken, if there are not as many."""
        if count < 0:
            raise ValueError(f"asked for {count} pages; expected 0 or more")
        rest = len(self._free) - count
        if rest < 0:
            return None
        pages = self._free[rest:]
        del self._free[rest:]
        for page in pages:
            self._sequences[page] = 1
        return pages

    def retain(self, page: int) -> None:
        """Add a sequence's reference to a page that is in use."""
        self._require_used(page)
        if not self._sequences[page]:
            self._idle -= 1
        self._sequences[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one of the sequences' references to each page; those that nothing refers to any more become free."""
        for page in pages:
            self._require_used(page)
            if not self._sequences[page]:
                raise IntegrityError(f"page {page} was released more often than it was allocated and retained")
            self._sequences[page] -= 1
            if not self._sequences[page]:
                if self._cached[page]:
                    self._idle += 1
                else:
                    self._free.append(page)

    def cache(self, page: int) -> None:
        """Add a reference of the prefix cache to a page that is in use."""
        self._require_used(page)
        self._cached[page] += 1

    def uncache(self, page: int) -> None:
        """Drop one of the prefix cache's references to a page."""
        self._require_used(page)
        if not self._cached[page]:
            raise IntegrityError(f"page {page} left the prefix cache more often than it entered")
        self._cached[page] -= 1
        if not self._cached[page] and not self._sequences[page]:
            self._idle -= 1
            self._free.append(page)

    def references(self, page: int) -> int:
        """How many references there are to a page."""
        self._require_known(page)
        return self._sequences[page] + self._cached[page]

    def cached(self, page: int) -> int:
        """How many of the references to a page are the prefix cache's."""
        self._require_known(page)
        return self._cached[page]

    def check(self) -> None:
        """Compare everything with everything.

        Raises:
            IntegrityError: Something does not fit.
        """
        if min(self._sequences) < 0 or min(self._cached) < 0:
            raise IntegrityError("a page has fewer than no references")
        free = set(self._free)
        if len(free) != len(self._free):
            raise IntegrityError("a page is free twice")
        unused = {page for page in range(self.total) if not self._sequences[page] and not self._cached[page]}
        if free != unused:
            raise IntegrityError(f"free and used, or neither: pages {sorted(free ^ unused)}")
        idle = sum(not s and c > 0 for s, c in zip(self._sequences, self._cached, strict=True))
        if idle != self._idle:
            raise IntegrityError(f"only the cache refers to {idle} pages; {self._idle} were counted")

    def _require_known(self, page: int) -> None:
        if not 0 <= page < self.total:  # a negative number would count from the end
            raise IntegrityError(f"page {page} does not exist; the pool has pages 0 to {self.total - 1}")

    def _require_used(self, page: int) -> None:
        self._require_known(page)
        if not self._sequences[page] and not self._cached[page]:
            raise IntegrityError(f"page {page} is free; expected one in use")
