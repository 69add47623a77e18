"""SAM in files: read, checked, renamed, downloaded."""
