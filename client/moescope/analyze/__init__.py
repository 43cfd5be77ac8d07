"""``moescope analyze``: routes read as a stream; figures, tables and a page of them."""
