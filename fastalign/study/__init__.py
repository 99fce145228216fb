"""Studies of alignment that one command runs from nothing to a report: see `fastalign study --help`."""
