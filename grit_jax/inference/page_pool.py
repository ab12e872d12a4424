"""Which pages of a paged cache are free, which are in use, and which hold a known prefix.

Everything here is on the host: a page is an index.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PagePool:
    """Counts the users of each page, and remembers what full pages hold.

    A page with no user is free. If its content is known, it keeps it until the page is needed:
    the page that has been free for longest is reused first.

    Args:
      num_pages: number of pages.

    Attributes:
      num_pages: number of pages.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._users = [0] * num_pages
        self._empty = list(reversed(range(num_pages)))  # Free pages with no known content.
        self._kept: OrderedDict[int, None] = OrderedDict()  # Free pages with known content.
        self._page_of: dict[bytes, int] = {}
        self._content_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Number of pages with no user."""
        return len(self._empty) + len(self._kept)

    @property
    def num_used(self) -> int:
        """Number of pages with a user."""
        return self.num_pages - self.num_free

    def allocate(self, count: int) -> list[int]:
        """Returns pages with one user each, which the user may write to.

        Raises:
          ValueError: fewer than `count` pages are free.
        """
        if count > self.num_free:
            raise ValueError(f"{count} pages are needed, but only {self.num_free} are free")
        return [self._take_free_page() for _ in range(count)]

    def register(self, page: int, content: bytes) -> None:
        """Records what a full page holds, so that others share it.

        Nothing changes if another page is known to hold the same.

        Args:
          page: a page in use; nobody writes to it from now on.
          content: identifies the keys and values, and all that they depend on.
        """
        if content not in self._page_of and page not in self._content_of:
            self._page_of[content] = page
            self._content_of[page] = content

    def holds(self, content: bytes) -> bool:
        """Returns whether a page is known to hold this content."""
        return content in self._page_of

    def share(self, content: bytes) -> int:
        """Returns the page with a known content, with one more user."""
        page = self._page_of[content]
        self._kept.pop(page, None)
        self._users[page] += 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Removes one user of each page."""
        for page in pages:
            if self._users[page] == 0:
                raise ValueError(f"page {page} has no user")
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._content_of:
                    self._kept[page] = None
                else:
                    self._empty.append(page)

    def forget(self, pages: Sequence[int]) -> None:
        """Forgets the content of pages, so that nobody shares them from now on."""
        for page in pages:
            if (content := self._content_of.pop(page, None)) is not None:
                del self._page_of[content]
            if page in self._kept:
                del self._kept[page]
                self._empty.append(page)

    def num_users(self, page: int) -> int:
        """Returns the number of users of a page."""
        return self._users[page]

    def _take_free_page(self) -> int:
        if not self._empty:
            self.forget([next(iter(self._kept))])
        page = self._empty.pop()
        self._users[page] = 1
        return page
