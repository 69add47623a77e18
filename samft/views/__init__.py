"""Windows of large images: where they are, which objects they hold, and the way there and back."""
