"""Images and boxes in, masks as COCO results out."""
