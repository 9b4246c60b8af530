"""Tables: TITLE, INPUTS (what they read) and build(frames) -> Table."""
