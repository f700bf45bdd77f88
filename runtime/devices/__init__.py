"""The targets: what each device computes in, how fast it is, and which of them this machine is."""
