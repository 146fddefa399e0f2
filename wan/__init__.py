"""What Wan and its community publish: the parts of a model, their files, and their names."""
