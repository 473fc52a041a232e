"""The command line and launchers: how a recipe gets onto machines. Imports no torch at module level."""
