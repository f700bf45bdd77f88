"""Width and depth decided together, for one budget in seconds: the options, their tables, and the exact choice among
them."""
