"""What people look at: curves, confusion matrices, overlays, the HTML report."""
