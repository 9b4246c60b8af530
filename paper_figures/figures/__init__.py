"""One module a figure: TITLE, INPUTS (what it reads) and draw(frames) -> matplotlib Figure."""
