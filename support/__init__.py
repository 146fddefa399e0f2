"""Machinery that knows no model: command line, media, clips, stopping and going on, several processes, cost."""
