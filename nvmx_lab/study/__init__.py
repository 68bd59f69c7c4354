"""Studies: pandas pipelines from counts and prices to tidy frames."""
