"""What stands on nothing else of this package."""
