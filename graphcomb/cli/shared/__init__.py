"""What several commands share: arguments, shapes of inputs, and output."""
