"""A model plus a batch gives a loss and logs: one LightningModule a task."""
