"""Units, allocation, plan, surgery and reconstruction."""
