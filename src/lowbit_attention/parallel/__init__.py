"""Attention whose keys lie in several places: partial results, and how they become one."""
