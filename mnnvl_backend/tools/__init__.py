"""The command line and what it runs: doctor, demo, bench."""
