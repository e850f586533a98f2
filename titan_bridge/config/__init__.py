"""The TOML files: their schema and the one reader."""
