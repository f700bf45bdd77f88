"""Statistics of layers over data that decide which weights go: gradients, Fisher matrices and moments of inputs."""
