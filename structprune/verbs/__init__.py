"""The verbs of the command line: arguments only; each hands over to `structprune.runs` or a driver of its own."""
