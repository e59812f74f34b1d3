"""From files to batches: rows -> messages -> samples -> batches. Each word is a file."""
