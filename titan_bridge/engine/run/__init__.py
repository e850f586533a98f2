"""Starting engines: in this process, on ranks of their own, and as an HTTP server."""
