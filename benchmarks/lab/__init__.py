"""The replication lab: a matrix of arms is trained, scored and written down cell by cell.

matrix (YAML) -> cells -> documents and samples -> workers (train, score, losses, predictions) -> rows
"""
