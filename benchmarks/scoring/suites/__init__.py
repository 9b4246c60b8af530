"""The suites of `endprompt score`, a file each: `SUITE` of the module with its name (benchmarks.scoring.suite)."""
