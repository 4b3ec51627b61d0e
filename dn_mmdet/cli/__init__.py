"""What the command-line tools share, and what single ones of them do."""
