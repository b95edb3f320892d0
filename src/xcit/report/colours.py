"""The colours that all pictures share."""

INK, GREY, GRID, GROUND = "#1f2430", "#6b7280", "#e5e7eb", "#f6f7f9"
BLUE, ORANGE, GREEN, RED = "#2563eb", "#ea8a1f", "#15803d", "#c81e3a"
