"""What a person looks at: pictures, charts and report.html."""
