"""Measuring speed: shapes, providers (ours and the peers), timing, results. ``lowbit bench`` runs it."""
