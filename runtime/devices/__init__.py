"""The devices: what each can compute, and how fast."""
