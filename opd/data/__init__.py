"""Problems and prompts: data files, benchmarks by name, toy tasks."""
