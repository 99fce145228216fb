"""`fastalign demo`: a small model aligned on real ratings, start to end."""
