"""Models that configs name in their ``custom_imports``; they need MMDetection or MMPretrain."""
