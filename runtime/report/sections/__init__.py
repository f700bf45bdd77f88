"""The parts of the report on a run: its headline, tables of layers, passes, plan and devices, and plots."""
