"""What to run: functions that return a complete typed config, and the one place where it becomes a training run."""
