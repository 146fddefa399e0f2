"""The paper's claims, rerun on the embedded model: `python -m paper`, one file a claim."""
