"""Two small web apps: rating answers by people, and a playground."""
