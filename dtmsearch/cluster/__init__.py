"""Where it runs: Ray. Never imports torch; what its actors host is named by an import string."""
