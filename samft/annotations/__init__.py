"""What a COCO file says: its images, objects, masks and boxes, read and checked. No torch."""
