"""A COCO annotation file: found, read, checked, indexed, repaired, described. Imports no torch."""
