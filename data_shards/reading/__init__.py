"""The order of training data, and the reader that delivers it."""
