"""Questions about databases, judged by running the queries on SQLite."""
