"""One budget, decided together: `tune` makes a plan from tables (`tables`), `plan` reads, edits and carries it out, and
`sensitivity` shows the tables to a person."""
