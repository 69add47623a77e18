"""Masks for other tools: outlines, COCO datasets, and the layouts that other tools write."""
