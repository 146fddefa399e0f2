"""A page in the browser on which every frame's noise level can be seen and changed, and run: `python -m play`."""
