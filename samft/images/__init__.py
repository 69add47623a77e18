"""Image files: found, inspected without decoding, and decoded. Imports no torch."""
