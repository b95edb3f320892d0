"""A trained model made ready for use: folded weights, files for other runtimes, lower precision."""
