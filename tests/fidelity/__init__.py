"""Long comparisons of routes with the truth, each a command with its last result committed."""
