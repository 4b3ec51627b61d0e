"""Data sets that configs name in their ``custom_imports``."""
