"""One file per subcommand of `titan-bridge`."""
