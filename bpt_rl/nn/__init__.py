"""The long-context transformer: attention, feedforward, the stack and its cache."""
