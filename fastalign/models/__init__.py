"""What is done to other people's models: their heads, adapters, prompts and samples."""
