"""Modules with weights: the backbone, the tables of released models, and the reading and writing of weights."""
