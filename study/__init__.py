"""The study: its rows, the command that runs them, and the numbers, tables and figures from what they logged."""
