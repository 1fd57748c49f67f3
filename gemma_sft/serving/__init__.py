"""Two small pages: people rate answers, and a playground for a run."""
