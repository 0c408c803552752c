"""Studies: what quantised attention does to whole models. Not part of the library's wheel."""
