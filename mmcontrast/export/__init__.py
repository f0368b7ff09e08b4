"""Export: a model written in the form of another library, reopened there, and compared on real samples."""
