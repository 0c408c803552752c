"""What one call is: its request, the checks of its arguments, its masks."""
