"""What a person looks at: one self-contained page about a run, or two compared, and its figures as files."""
