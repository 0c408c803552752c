"""Exit codes of the command."""

INTERRUPTED = 130
"""After Ctrl-C: 128 and the signal's number, as shells have it."""
