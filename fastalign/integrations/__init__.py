"""The fused losses under other people's training code; each module needs the library that it is named after."""
