"""A trained model in use. Imports neither Lightning nor timm."""
