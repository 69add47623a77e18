"""A COCO file as a dataset: found, indexed, chosen from, repaired, described. Imports no torch."""
