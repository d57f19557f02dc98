"""What a run was: everything measured in report.json, the summary a person reads, and hints at what made it slow. Made once the work is done."""
