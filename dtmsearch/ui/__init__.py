"""A store in a browser: pages from a small server of one's own on this machine."""
