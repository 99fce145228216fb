"""What every other module may import and what imports none of them."""
