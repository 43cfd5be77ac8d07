"""The reference that routes are compared with, and the table of what was compared."""
