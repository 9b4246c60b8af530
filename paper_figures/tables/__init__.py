"""One module a table: TITLE, INPUTS (what it reads) and build(frames) -> Table."""
