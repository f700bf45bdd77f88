"""The choice of sizes and blocks as an optimisation problem, and its exact solvers."""
