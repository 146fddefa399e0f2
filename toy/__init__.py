"""The embedded model: its toy world, how it is grown, and how it is judged."""
