"""Every figure and table of the paper, and the audit of its numbers, from files alone."""
