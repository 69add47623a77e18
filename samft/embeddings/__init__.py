"""A frozen image encoder's outputs, computed once and kept on disk."""
