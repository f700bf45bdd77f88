"""Width and depth decided together, for one budget in seconds: options, their tables, the exact choice among them."""
