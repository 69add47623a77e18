"""For people: pictures of masks, charts, the summary of a run, and report.html."""
