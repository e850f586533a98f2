"""One declarative file per model family: which mesh axis shards which dim of which parameter."""
