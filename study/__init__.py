"""The study: its rows as data, the command that runs them, and what is computed and drawn from their logs."""
