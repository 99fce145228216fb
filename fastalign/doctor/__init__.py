"""`fastalign doctor`: what is wrong with data and models, before anything is trained."""
