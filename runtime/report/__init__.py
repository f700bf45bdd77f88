"""The report of a run as one HTML file, and the gate that compares a build with an earlier one (gate)."""
