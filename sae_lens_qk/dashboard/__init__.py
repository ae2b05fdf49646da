"""One HTML file that shows a dictionary, its statistics and explained prompts; see `report`."""
