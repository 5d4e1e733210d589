"""A library of refitted widths for every block, and the search for the best combination within a budget."""
