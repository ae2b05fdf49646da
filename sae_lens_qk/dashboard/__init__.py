"""Static HTML reports of a dictionary: see `report.write_report`."""
