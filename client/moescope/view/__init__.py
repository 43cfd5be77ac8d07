"""``moescope view``: the page of a server as one file, with the traces that it shows."""
