"""`fastalign doctor`: is the installation sound, and what is wrong with data and models, before anything is trained."""
