"""The room that knows `TrainConfig`: builds the parts, then trains, evaluates or estimates."""
